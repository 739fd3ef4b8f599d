"""`p2pmodel doctor`: what it finds wrong, what it advises, and how it ends."""

import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pmodel.cli.app import app
from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.swarm import LineageOffer
from p2pmodel.node.machine import checkup, diagnosis
from p2pmodel.node.machine.checkup import Finding, check_ports, examine_machine
from p2pmodel.node.machine.network import examine_node, examine_peers, reachability
from p2pmodel.store.home import Home
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.ping import PingResponder, State
from p2pmodel.swarm.sync import SyncServer
from p2pmodel.wire.signing import Key
from p2pmodel.wire.swarm_key import SwarmKey
from p2pmodel.wire.v1 import control_pb2 as pb

PEER = Key.generate().peer


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.topic, finding.level) for finding in findings]


def test_a_port_that_is_taken_ends_with_status_1_and_says_what_to_do(tmp_path: Path, taken: int) -> None:
    (tmp_path / "config.toml").write_text(f"[join]\nport = {taken}\n")
    done = CliRunner().invoke(app, ["doctor", "--json", "--home", str(tmp_path)])
    found = {(one["topic"], one["level"]): one for one in json.loads(done.stdout)}
    assert done.exit_code == 1
    assert f"port {taken} on 127.0.0.1 can't be opened" in found["ports", "bad"]["what"]
    assert "--port" in found["ports", "bad"]["advice"]
    assert found["node", "note"]["what"] == "No node runs on this home."
    assert {("software", "ok"), ("disk", "ok"), ("home", "ok")} <= found.keys()
    assert not [one for one in found.values() if one["level"] != "ok" and not one["advice"]]


def test_a_swarm_key_is_looked_at_without_peers_too(tmp_path: Path) -> None:
    key = tmp_path / "swarm.key"
    key.write_text("no key\n")
    key.chmod(0o600)
    found = {each.what: each.level for each in examine_machine(tmp_path / "home", "127.0.0.1", 0, False, key)}
    assert found[f"{key} is not a swarm key."] == "bad"
    key.write_bytes(SwarmKey.generate().to_text())
    text = f"only for a private swarm, with the key {SwarmKey.from_text(key.read_bytes(), '').fingerprint}"
    assert Finding("home", "ok", text) in list(examine_machine(tmp_path / "home", "127.0.0.1", 0, False, key))


def test_ports() -> None:
    assert levels(list(check_ports("127.0.0.1", 0))) == [("ports", "ok")]
    assert levels(list(check_ports("203.0.113.1", 0))) == [("ports", "bad")]


def test_what_this_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "LITTLE_DISK", 1 << 60)
    monkeypatch.setattr(checkup, "LITTLE_MEMORY", 1 << 60)
    monkeypatch.setattr(checkup, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(checkup, "requires", lambda name: ["rich<1", "nothing; extra == 'gpu'"])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 512))
    (tmp_path / "config.toml").write_text("join = [\n")
    found = {(f.topic, f.level): f for f in examine_machine(tmp_path, "127.0.0.1", 0, True)}
    assert "config.toml" in found["home", "bad"].what
    assert "ulimit -n 512" in found["limits", "note"].advice
    assert found["memory", "note"].advice
    assert found["software", "bad"].advice == "pip install 'rich<1'"
    assert ("ports", "ok") not in found
    (tmp_path / "config.toml").unlink()
    found = {(f.topic, f.level): f for f in examine_machine(tmp_path, "127.0.0.1", 0, True)}
    assert "p2pmodel gc" in found["disk", "bad"].advice


@pytest.mark.parametrize(
    ("text", "listens"),
    [
        ("", ("127.0.0.1", 0)),
        ('[join]\nhost = "0.0.0.0"\nport = 7000', ("0.0.0.0", 7000)),
        ('[join]\nport = "x"', ("127.0.0.1", 0)),
        ("join = 3", ("127.0.0.1", 0)),
        ("join = [", ("127.0.0.1", 0)),
    ],
    ids=["nothing", "both", "no-number", "no-table", "no-toml"],
)
def test_it_looks_at_the_ports_that_join_would_take(tmp_path: Path, text: str, listens: tuple[str, int]) -> None:
    (tmp_path / "config.toml").write_text(text)
    assert diagnosis._listens(tmp_path) == listens


@pytest.mark.parametrize(
    ("ways", "level", "what"),
    [
        (["/ip4/127.0.0.1/tcp/7000"], "note", "from this machine only"),
        (
            ["/ip4/127.0.0.1/tcp/7000", "/ip4/192.168.0.7/tcp/7000"],
            "note",
            "192.168.0.7, an address of the local network",
        ),
        (["/ip4/192.168.0.7/tcp/7000", "/ip4/8.8.8.8/tcp/7000"], "ok", "8.8.8.8, an address of the internet"),
        ([], "note", "from this machine only"),
    ],
    ids=["loopback", "local", "public", "none"],
)
def test_who_can_reach_a_node(ways: list[str], level: str, what: str) -> None:
    found = reachability([f"{way}/p2p/{PEER}" for way in ways])
    assert found.level == level
    assert what in found.what
    assert found.advice


def test_a_node_that_runs_is_described() -> None:
    model = pb.ModelStatus(name="mine", hosted=pb.Span(start=0, end=3))
    findings = examine_node(pb.StatusReply(pid=7, models=[model]))
    assert findings[0].what == "a node runs on this home (process 7) and serves layers 0:3 of mine"


async def test_peers_are_reached_asked_and_compared_with(tmp_path: Path) -> None:
    home = Home.open(tmp_path)
    assert home.key
    digest = Digest("ab" * 32)
    offer = LineageOffer(digest, "mine", BlobRef(digest, 1), digest)
    host = await PeerHost.start(home.key_path)
    ping, sync = PingResponder(host, lambda session: State(0.0, 0)), SyncServer(host, lambda model: (), lambda: [offer])
    await sync.start()
    ping.start()
    try:
        gone = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"
        findings = await examine_peers([host.addresses[0], gone])
        assert levels(findings) == [("peers", "ok"), ("peers", "ok"), ("clock", "ok"), ("peers", "bad")]
        assert "has mine (abababab" in findings[1].what
        assert "connection refused" in findings[3].what
        assert "\n" not in findings[3].what
        with pytest.raises(UsageError):
            await examine_peers(["here"])
    finally:
        ping.stop()
        await sync.stop()
        await host.stop()
