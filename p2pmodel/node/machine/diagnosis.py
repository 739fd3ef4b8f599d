"""`p2pmodel doctor`: the machine, the node that runs on the home, and peers, one after another."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from p2pmodel.control.client import ControlClient
from p2pmodel.domain.errors import NotRunning, P2PModelError
from p2pmodel.node.machine.checkup import Finding, examine_machine
from p2pmodel.store.home import Home
from p2pmodel.wire.v1 import control_pb2 as pb

LISTEN_HOST, LISTEN_PORT = "127.0.0.1", 0
"""As `p2pmodel join` has them."""


def diagnose(
    home: Path | None, peers: Sequence[str], host: str | None, port: int | None, swarm_key: Path | None = None
) -> list[Finding]:
    """host, port: None for what config.toml says that join listens on. Raises UsageError for an address that is none,
    and what `Home.swarm_key` raises for a key that cannot be read."""
    node = _node(home)
    running = isinstance(node, pb.StatusReply)
    own_host, own_port = _listens(home)
    findings = list(examine_machine(home, host or own_host, own_port if port is None else port, running, swarm_key))
    if isinstance(node, Finding):
        findings.append(node)
    if running or peers:
        from p2pmodel.node.machine.network import examine_node, examine_peers  # loads hivemind

        if isinstance(node, pb.StatusReply):
            findings += examine_node(node)
        if peers:
            findings += asyncio.run(examine_peers(peers, Home.open(home).swarm_key(swarm_key)))
    return findings


def _node(home: Path | None) -> pb.StatusReply | Finding:
    try:
        with ControlClient.connect(Home.open(home).control_socket) as client:
            return client.status()
    except NotRunning as error:
        return Finding("node", "note", error.message, "p2pmodel join")
    except P2PModelError as error:
        return Finding("node", "bad", error.message, error.hint)


def _listens(home: Path | None) -> tuple[str, int]:
    """As config.toml says. What is wrong with the file is found where the home is looked at."""
    try:
        found = Home.open(home).settings().get("join", {})
    except P2PModelError:
        found = {}
    host, port = (found.get("host"), found.get("port")) if isinstance(found, dict) else (None, None)
    return (
        host if isinstance(host, str) else LISTEN_HOST,
        port if isinstance(port, int) and 0 <= port < 65535 else LISTEN_PORT,
    )
