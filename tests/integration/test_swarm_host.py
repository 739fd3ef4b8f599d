"""A peer's host: starting, meeting others, and ending together with its daemon however the process ends."""

import asyncio
import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from p2pmodel.domain.errors import Busy, NotFound, P2PModelError, PeerFailed, StorageError, Unreachable, UsageError
from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm.addresses import parse_peer_address
from p2pmodel.swarm.host import PeerHost
from p2pmodel.wire.signing import Key

NOBODY = PeerId("12D3KooWJw7iYGWY4q3LNcCKHWttAc2mfkVoegmXVaMLmP3L493u")

NODE = """
import asyncio, json, os, signal, sys, uvloop
from p2pmodel.swarm.host import PeerHost

async def main():
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    host = await PeerHost.start(None)
    sockets = [address["unix"] for address in (host.p2p._daemon_listen_maddr, host.p2p._client_listen_maddr)]
    try:
        pids = {"node": os.getpid(), "daemon": host.p2p._child.pid}
        print(json.dumps({"mode": mode, "sockets": sockets, **pids}), flush=True)
        await ended.wait()
    finally:
        await host.stop()

nodes = {}
for mode in sys.argv[1:]:
    pid = os.fork()
    if not pid:
        os.setsid()
        try:
            uvloop.run(main())
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    nodes[pid] = mode
for _ in nodes:
    pid, status = os.wait()
    print(json.dumps({"mode": nodes[pid], "status": os.waitstatus_to_exitcode(status)}), flush=True)
"""


def is_gone(pid: int, seconds: float = 10.0) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(process) as file:
        return bool(select.select([file], [], [], seconds)[0])


def test_the_daemon_ends_with_its_node_however_that_ends() -> None:
    """TERM: in order. INT: as a terminal sends it, to the whole process group. KILL: with a daemon that hangs."""
    modes = ["TERM", "INT", "KILL"]
    script = subprocess.Popen(
        [sys.executable, "-c", NODE, *modes], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert script.stdout is not None
    nodes: list[dict[str, Any]] = [json.loads(script.stdout.readline()) for _ in modes]
    try:
        for node in nodes:
            assert not is_gone(node["daemon"], 0.05)
            if node["mode"] == "TERM":
                os.kill(node["node"], signal.SIGTERM)
            elif node["mode"] == "INT":
                os.killpg(node["node"], signal.SIGINT)
            else:
                os.kill(node["daemon"], signal.SIGSTOP)
                os.kill(node["node"], signal.SIGKILL)
        output, errors = script.communicate(timeout=30)
        assert all(is_gone(node["daemon"]) for node in nodes)
    finally:
        for pid in (script.pid, *(node[name] for node in nodes for name in ("node", "daemon"))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    ends = map(json.loads, output.splitlines())
    assert {end["mode"]: end["status"] for end in ends} == {"TERM": 0, "INT": 130, "KILL": -9}
    assert errors == ""
    left = {node["mode"]: [path for path in node["sockets"] if Path(path).exists()] for node in nodes}
    assert not left["TERM"]
    assert not left["INT"]
    for path in left["KILL"]:
        os.unlink(path)


def sockets_of(host: PeerHost) -> list[str]:
    """Those of the daemon's sockets that lie in the file system."""
    paths = [address["unix"] for address in (host.p2p._daemon_listen_maddr, host.p2p._client_listen_maddr)]
    return [path for path in paths if os.path.exists(path)]


async def test_hosts_meet_and_know_each_other_by_their_keys(tmp_path: Path) -> None:
    key = Key.generate()
    (tmp_path / "key").write_bytes(key.to_libp2p())
    first = await PeerHost.start(tmp_path / "key")
    second = await PeerHost.start(None, bootstrap=first.addresses)
    third = await PeerHost.start(None)
    try:
        assert first.peer == key.peer
        assert sockets_of(first)
        assert all(parse_peer_address(address)[0] == key.peer for address in first.addresses)
        assert await second.peers() == [first.peer]
        await third.connect(second.peer, second.addresses)
        assert second.peer in await third.peers()
        of_no_use = ["x", "/ip4/127.0.0.1/tcp/1", f"/new/127.0.0.1/tcp/1/p2p/{first.peer}", first.addresses[0]]
        with pytest.raises(PeerFailed):
            await third.connect(NOBODY, of_no_use)
        await third.connect(second.peer, of_no_use)  # it is connected already
        await third.join([*third.addresses, *first.addresses])
        with pytest.raises(PeerFailed) as failed:
            await third.connect(NOBODY, [f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"])
        assert failed.value.peer == NOBODY
        with pytest.raises(Busy, match=first.addresses[0].split("/")[4]):
            await PeerHost.start(None, listen=[first.addresses[0].partition("/p2p/")[0]])

        os.kill(second.p2p._child.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            await second.ended()
    finally:
        await asyncio.gather(*(host.stop() for host in (first, second, third)))
    for host in (first, second, third):
        assert is_gone(host.p2p._child.pid)
        assert not sockets_of(host)


async def test_bootstrap_peers_that_do_not_answer_are_named() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        addresses = [
            f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}",
            f"/ip4/127.0.0.1/tcp/{deaf.getsockname()[1]}/p2p/{Key.generate().peer}",
        ]
        before = time.monotonic()
        with pytest.raises(Unreachable) as unreachable:
            await PeerHost.start(None, bootstrap=addresses)
    assert all(address in str(unreachable.value) for address in addresses)
    assert time.monotonic() - before < 20


@pytest.mark.parametrize(
    "address",
    [
        "",
        "somewhere",
        "127.0.0.1:31337",
        "/ip4/127.0.0.1/tcp/31337",
        f"/p2p/{NOBODY}",
        f"/ip4/300.0.0.1/tcp/1/p2p/{NOBODY}",
        f"/ip4/127.0.0.1/tcp/99999/p2p/{NOBODY}",
        "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}/p2p-circuit",
        f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}\n",
        "/ip4/1.2.3.4/nonsense/5",
    ],
)
async def test_what_is_no_peers_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(UsageError, match=re.escape("/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW")):
        await PeerHost.start(None, bootstrap=[address])


def test_a_peer_behind_a_relay_is_the_last_of_its_address() -> None:
    relay = Key.generate().peer
    peer, way = parse_peer_address(f"/dns4/relay.example.org/tcp/31337/p2p/{relay}/p2p-circuit/p2p/{NOBODY}")
    assert (peer, str(way)) == (NOBODY, f"/dns4/relay.example.org/tcp/31337/p2p/{relay}/p2p-circuit")


@pytest.mark.parametrize(
    "address", ["", "0.0.0.0:1", "/ip4/127.0.0.1", "/ip4/127.0.0.1/tcp/x", "/ip4/203.0.113.7/tcp/31337"]
)
async def test_what_cannot_be_listened_on_is_refused(address: str) -> None:
    with pytest.raises(UsageError):
        await PeerHost.start(None, listen=[address])


async def test_a_key_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await PeerHost.start(tmp_path / "missing")
    (tmp_path / "key").write_bytes(b"no key at all")
    with pytest.raises(StorageError):
        await PeerHost.start(tmp_path / "key")
    assert os.listdir(tmp_path) == ["key"]


async def test_a_daemon_that_does_not_start_says_why() -> None:
    with pytest.raises(P2PModelError, match="did not start"):
        await PeerHost.start(None, listen=["/ip4/127.0.0.1/tcp/0/ws/tls"])


def test_hivemind_logs_as_the_program_does() -> None:
    logger = logging.getLogger("hivemind.p2p")
    assert logger.getEffectiveLevel() >= logging.WARNING  # a command that ran in this process may have raised it
    assert logging.getLogger("hivemind").handlers == []
    assert logging.getLevelName(logging.WARNING) == "WARNING"
