"""Checkpoints from a model hub: a small server that speaks as much of the hub's API as its own library asks for, over
real sockets, and commands and nodes in processes of their own."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import read_checkpoint
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(240)
FIRST, MOVED = "a" * 40, "b" * 40
BIG = 24 << 20
SECONDS = 150.0


class Hub(ThreadingHTTPServer):
    """repositories: name -> files; refused: name -> (status, error code); claims: digests that are lies; stall_after:
    bytes of a large file after which its transfer hangs, until it is set to 0."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Path] = {}
        self.commit = FIRST
        self.refused: dict[str, tuple[int, str]] = {}
        self.claims: dict[str, str] = {}
        self.stall_after = 0
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.log: list[tuple[str, str, int]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> set[str]:
        return {name for method, name, _ in self.log if method == "GET" and not name.startswith("api/")}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, self.path.split("?")[0].strip("/")
        found = re.fullmatch(r"(?:api/models/)?([^/]+/[^/]+?)(?:/(?:revision|resolve)/([^/]+))?(?:/(.+))?", path)
        assert found, path
        repository, revision, name = found[1], found[2] or "main", found[3]
        if repository in hub.refused or repository not in hub.repositories:
            status, code = hub.refused.get(repository, (401, "RepoNotFound"))
            return self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})
        if revision not in ("main", FIRST, hub.commit):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = hub.repositories[repository]
        if name is None:
            return self.reply(200, json.dumps(self.listing(repository, folder)).encode())
        if not (folder / name).is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})
        return self.send(folder / name, name, FIRST if revision == FIRST else hub.commit)

    def listing(self, repository: str, folder: Path) -> dict[str, Any]:
        siblings = []
        for path in sorted(folder.iterdir()):
            entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": "0" * 40}
            if path.suffix == ".safetensors":
                entry["lfs"] = {"sha256": self.digest(path), "size": path.stat().st_size, "pointerSize": 130}
            siblings.append(entry)
        return {"id": repository, "modelId": repository, "sha": self.server.commit, "siblings": siblings}

    def digest(self, path: Path) -> str:
        return self.server.claims.get(path.name) or sha256(path)

    def send(self, path: Path, name: str, commit: str) -> None:
        content = path.read_bytes()
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").split("-")[0]) or 0)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{self.digest(path)}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.server.log.append((self.command, name, start))
        self.reply(206 if start else 200, content[start:], headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.server
        if hub.stall_after and len(body) > hub.stall_after:
            self.wfile.write(body[: hub.stall_after])
            self.wfile.flush()
            hub.stalled.set()
            hub.go_on.wait(SECONDS)
            self.close_connection = True
            return
        self.wfile.write(body)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter model in three files, or a few more."""
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(starter.MODEL).save_pretrained(folder, max_shard_size="4MB")
    for path in starter.MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "p2pmodel", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, **environment},
    )


FETCH = """
import sys
from pathlib import Path
from p2pmodel.domain.model import BlobRef, ModelFile
from p2pmodel.node.lineages import hub
source = hub.Source.parse(sys.argv[1])
listing = hub.list_files(source)
files = [ModelFile(n, BlobRef(listing.digests[n], s)) for n, s in listing.sizes.items() if n in listing.digests]
print(hub.fetch(listing.source, files))
"""


def fetching(repository: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, repository], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def weights_cached(home: Path) -> set[str]:
    return {path.name for path in home.glob("hub/models--*/snapshots/*/*.safetensors")}


def test_a_node_and_a_client_fetch_only_the_files_that_they_need(
    hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = sharded
    checkpoint = read_checkpoint(sharded)
    spans = [Span(0, 2), Span(2, checkpoint.layers)]
    needed = [set(checkpoint.weight_files(span)) for span in spans]
    of_head = set(checkpoint.weight_files(None))
    everything = {path.name for path in sharded.glob("*.safetensors")}
    assert len(everything) >= 3
    assert needed[0] < everything
    with LocalSwarm(tmp_path) as swarm:
        deadline = time.monotonic() + SECONDS
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-0"))
        first = swarm.start("first", "--model", "org/tiny", "--layers", str(spans[0]), "--threads", "1")
        first.wait_until_serving(deadline)
        assert weights_cached(tmp_path / "hf-0") == needed[0]
        # The branch moves on, to something else: the Manifest pins the commit that it was made of.
        hub.commit = MOVED
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-1"))
        joins = ("--peers", first.address, "--layers", str(spans[1]), "--threads", "1")
        swarm.start("second", "--model", "org/tiny", *joins).wait_until_serving(deadline)
        assert weights_cached(tmp_path / "hf-1") == needed[1]
        assert {path.name for path in (tmp_path / "hf-1").glob("hub/models--*/snapshots/*")} == {FIRST}
        asked = ("infer", "--peers", first.address, "--home", str(tmp_path / "client"), "--max-new-tokens", "4")
        answer = command(*asked, "--codec", "fp32", "--json", "import ", HF_HOME=str(tmp_path / "hf-2"))
        assert answer.returncode == 0, answer.stderr
        assert weights_cached(tmp_path / "hf-2") == of_head
        # Not asked again: what was fetched and verified is remembered.
        before = len(hub.log)
        again = command(*asked, "--codec", "fp32", "--json", "import ", HF_HOME=str(tmp_path / "hf-2"))
        assert json.loads(again.stdout)["text"] == json.loads(answer.stdout)["text"]
        assert len(hub.log) == before


def test_a_lineage_of_a_hub_id_needs_no_weights_and_pins_the_commit(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    hub.repositories["org/tiny"] = sharded
    made = command("model", "create", "org/tiny", "--name", "mine", "--home", str(tmp_path / "home"))
    assert made.returncode == 0, made.stderr
    assert not weights_cached(tmp_path / "hf")
    shown = command("model", "show", "mine", "--home", str(tmp_path / "home"), "--json")
    manifest = json.loads(shown.stdout)["manifest"]
    assert manifest["source"] == f"org/tiny@{FIRST}"
    digests = {file["name"]: file["blob"]["digest"] for file in manifest["files"]}
    assert digests == {name: sha256(sharded / name) for name in read_checkpoint(sharded).files}


def test_an_interrupted_download_goes_on_in_another_process(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(BIG))
    (folder / "config.json").write_text("{}")
    hub.repositories["org/big"] = folder
    hub.stall_after = 15 << 20
    killed = fetching("org/big")
    assert hub.stalled.wait(SECONDS)
    part = wait_for_part(tmp_path / "hf")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = part.stat().st_size
    hub.stall_after = 0
    hub.go_on.set()
    hub.log.clear()
    done = fetching("org/big")
    out, error = done.communicate(timeout=SECONDS)
    assert done.returncode == 0, error
    assert sha256(Path(out.strip()) / "model.safetensors") == sha256(folder / "model.safetensors")
    starts = [start for method, name, start in hub.log if (method, name) == ("GET", "model.safetensors")]
    assert starts == [kept]
    assert not part.exists()


def wait_for_part(home: Path) -> Path:
    def begun() -> Path | None:
        parts = home.glob("hub/models--*/blobs/*.p2pmodel.incomplete")
        return next((part for part in parts if part.stat().st_size), None)

    return until(begun, SECONDS, otherwise=lambda: "nothing arrived")


def test_a_file_that_is_not_what_the_hub_said_is_refused(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "liar"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(BIG))
    hub.repositories["org/liar"] = folder
    hub.claims["model.safetensors"] = "0" * 64
    done = fetching("org/liar")
    _, error = done.communicate(timeout=SECONDS)
    assert done.returncode
    assert "not the one that was asked for" in error
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize(
    ("repository", "refusal", "code", "sentence"),
    [
        ("org/nothing", (404, "RepoNotFound"), 3, "the hub has no such model, or it is private"),
        ("org/private", (401, "RepoNotFound"), 3, "hf auth login"),
        ("org/gated", (403, "GatedRepo"), 3, "is gated: its licence has to be accepted first"),
        ("org/broken", (500, "Internal"), 5, "answered 500"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(
    repository: str, refusal: tuple[int, str], code: int, sentence: str, hub: Hub
) -> None:
    hub.refused[repository] = refusal
    done = command("join", "--model", repository)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert sentence in done.stderr


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for offline in ("0", "1"):
        done = command("join", "--model", "org/tiny", HF_HUB_OFFLINE=offline)
        assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr
        assert "cannot be reached" in done.stderr


def test_a_folder_that_lacks_files_serves_the_spans_that_it_holds(sharded: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(sharded)
    last = checkpoint.weight_files(Span(checkpoint.layers - 1, checkpoint.layers))[-1]
    partial = tmp_path / "partial"
    shutil.copytree(sharded, partial)
    (partial / last).unlink()
    with LocalSwarm(tmp_path) as swarm:
        deadline = time.monotonic() + SECONDS
        first = swarm.start("first", "--model", str(sharded), "--layers", "1:3", "--threads", "1")
        first.wait_until_serving(deadline)
        joins = ("--peers", first.address, "--model", str(partial), "--base", str(partial), "--threads", "1")
        swarm.start("second", *joins, "--layers", "0:1").wait_until_serving(deadline)
        refused = command("join", *joins, "--home", str(tmp_path / "third"), "--layers", f"0:{checkpoint.layers}")
    assert refused.returncode == 4
    assert f"lacks {last}" in refused.stderr
