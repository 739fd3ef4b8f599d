"""`p2pmodel patch` and what belongs to it, as people run it."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import Digest
from p2pmodel.node.lineages.finding import SwarmFinder
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.node.lineages.states import patch_file_state
from p2pmodel.node.patches.patchbook import open_patch
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobServer
from p2pmodel.swarm.host import PeerHost
from p2pmodel.wire.statement import open_envelope
from tests.support.training import PROSE, byte_tokenizer, small_model

TRAINING = ("--steps", "8", "--checkpoint-every", "2", "--sequence", "32", "--fisher-examples", "4", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a text, a home with a lineage of them, and a patch."""
    folder = tmp_path_factory.mktemp("patches")
    small_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "prose.txt").write_text(PROSE * 60)
    home = Home.open(folder / "home")
    kinds = ("ia3@1", "lora@1")
    found(home, folder / "model", Founding("tiny", (home.key.peer,), 1, starter.EXAM, kinds=kinds, licence="MIT"))
    where = ("--model", "tiny", "--base", folder / "model", "--data", folder / "prose.txt")
    run(folder, "train", *where, "--output", folder / "a.p2patch", "--licence", "CC0-1.0", *TRAINING)
    return folder


def run(folder: Path, *arguments: object, code: int = 0, home: str = "home") -> str:
    result = CliRunner().invoke(app, [*map(str, arguments), "--home", str(folder / home)])
    if isinstance(result.exception, P2PModelError):
        assert result.exception.exit_code == code, result.exception
        return str(result.exception)
    assert result.exit_code == code, result.exception
    return result.stdout


def read(folder: Path, *arguments: object) -> Any:
    return json.loads(run(folder, *arguments, "--json"))


def test_what_a_patch_says_of_its_training(folder: Path) -> None:
    text = run(folder, "patch", "show", folder / "a.p2patch")
    assert "checkpoints  5, every 2 steps" in text
    assert "CC0-1.0, SHA-256 " in text
    assert "seed 0" in text
    envelope = run(folder, "patch", "show", folder / "a.p2patch", "--statement")
    patch, noun, signers = open_envelope(envelope.encode())
    assert patch == read(folder, "patch", "show", folder / "a.p2patch")["id"]
    assert signers == (noun.contributor,)
    (folder / "statement.json").write_text(envelope)
    told = read(folder, "patch", "verify", "--statement", folder / "statement.json")
    assert told == {"id": patch, "valid": True, "contributor": noun.contributor, "signers": [noun.contributor]}
    (folder / "statement.json").write_text(envelope.replace('"sig":"', '"sig":"AAAA'))
    run(folder, "patch", "verify", "--statement", folder / "statement.json", code=6)
    run(folder, "patch", "verify", "--statement", folder / "statement.json", folder / "a.p2patch", code=2)
    run(folder, "patch", "verify", code=2)
    described = json.loads(run(folder, "patch", "show", folder / "a.p2patch", "--croissant"))
    assert described["distribution"][0]["name"] == "prose.txt"
    run(folder, "patch", "show", folder / "a.p2patch", "--statement", "--recipe", code=2)


def test_an_audit_by_its_own_contributor_and_with_other_data(folder: Path, tmp_path: Path) -> None:
    arguments = ("patch", "audit", folder / "a.p2patch", "--base", folder / "model", "--segments", 2, "--seed", 3)
    report = read(folder, *arguments, "--data", folder / "prose.txt")
    assert [segment["verdict"] for segment in report["segments"]] == ["same", "same"]
    assert (report["steps"], report["of_steps"], report["fisher"]) == (4, 8, "same")
    (tmp_path / "prose.txt").write_text(PROSE * 61)
    refused = run(folder, *arguments, "--data", tmp_path / "prose.txt", code=4)
    assert "prose.txt, SHA-256" in refused


def test_an_audit_elsewhere_with_a_folder_of_states(folder: Path, tmp_path: Path) -> None:
    elsewhere = Home.open(tmp_path / "home")
    (lineage,) = known_lineages(Home.open(folder / "home"))
    Lineage.create(elsewhere, lineage.home.objects.load(lineage.model))
    states = tmp_path / "states"
    states.mkdir()
    patch = open_patch(folder / "home", str(folder / "a.p2patch")).patch
    for digest in (*patch.provenance.states, *patch.provenance.checkpoints):
        (states / digest).write_bytes(lineage.home.objects.load(digest))
    arguments = ("patch", "audit", folder / "a.p2patch", "--base", folder / "model", "--data", folder / "prose.txt")
    gone = run(tmp_path, *arguments, code=3)
    assert "could not be audited in full" in gone
    assert "nothing speaks against" in run(tmp_path, *arguments, "--checkpoints", states)
    for path in states.iterdir():
        path.chmod(0o644)
        path.write_bytes(b"something else")
    run(tmp_path, *arguments, "--checkpoints", states, code=3)


async def test_states_come_from_the_contributors_node(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "home", tmp_path / "served")
    served, here = Home.open(tmp_path / "served"), Home.open(tmp_path / "here")
    _ = served.key
    state = open_patch(served.path, str(folder / "a.p2patch")).patch.provenance.states[1]
    host = await PeerHost.start(served.key_path, listen=["/ip4/127.0.0.1/tcp/0"])
    server = BlobServer(host, served.objects)
    await server.start()

    def look() -> tuple[bytes | None, ...]:
        with SwarmFinder(here, host.addresses, served.key.peer, 1 << 20) as finder:
            absent = finder.find(Digest("0" * 64))
            found = finder.find(state)
        with SwarmFinder(here, host.addresses, served.key.peer, 10) as finder:
            return absent, found, finder.find(state)

    try:
        absent, found, too_large = await asyncio.to_thread(look)
    finally:
        await server.stop()
        await host.stop()
    assert absent is None
    assert found == served.objects.load(state)
    assert too_large is None


def test_exports_imports_and_rebases(folder: Path, tmp_path: Path) -> None:
    base = ("--base", folder / "model")
    run(folder, "patch", "export", folder / "a.p2patch", "--peft", tmp_path / "adapter", *base)
    run(folder, "patch", "export", folder / "a.p2patch", "--merged", tmp_path / "merged", "--dtype", "bf16", *base)
    run(folder, "version", "export", "base", tmp_path / "version", "--model", "tiny", *base)
    run(folder, "patch", "export", folder / "a.p2patch", code=2)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "version"}
    where = ("--model", "tiny", *base, "--output", tmp_path / "back.p2patch")
    done = read(folder, "patch", "import", tmp_path / "adapter", *where)
    assert done["fisher"] == "flat"
    lineage = open_patch(folder / "home", done["file"]).lineage
    given, back = (patch_file_state(lineage, Path(path)) for path in (folder / "a.p2patch", done["file"]))
    assert given.keys() == back.keys()
    assert all(torch.equal(given[name], back[name]) for name in given)
    assert "names no states" in run(
        folder, "patch", "audit", done["file"], "--data", folder / "prose.txt", *base, code=3
    )
    moved = ("rebase", folder / "a.p2patch", "--onto", "base", "--output", tmp_path / "new.p2patch", *base)
    text = run(folder, *moved, "--eval", folder / "prose.txt")
    assert "the old version with the patch" in text
    report = read(folder, *moved)
    assert report["weighted"] == 0
    run(folder, "patch", "verify", tmp_path / "new.p2patch")
    assert read(folder, "gc", "--dry-run")["objects"] == 0
