"""Real gossip children on loopback. libp2p is never imported here, only by the processes that these tests start."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from p2pmodel.domain.announcement import Announcement
from p2pmodel.domain.errors import Busy, NotRunning, Rejected, UsageError
from p2pmodel.domain.ids import ModelId
from p2pmodel.gossip import frames
from p2pmodel.gossip.link import GossipLink
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.factories import blob
from tests.support.waiting import soon

ROOT = Path(__file__).resolve().parents[2]
MODEL: ModelId = canonical.digest(b"model")
OTHER: ModelId = canonical.digest(b"another model")

pytestmark = pytest.mark.timeout(180)

ROGUE = """
import json, sys, trio
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr
from p2pmodel.gossip.mesh import open_mesh

async def main(order):
    async with open_mesh(bytes.fromhex(order["seed"]), "/ip4/127.0.0.1/tcp/0") as mesh:
        victim = info_from_p2p_addr(Multiaddr(order["address"]))
        await mesh.host.connect(victim)
        await mesh.pubsub.wait_for_subscription(victim.peer_id, order["topic"], timeout=60)
        for stranger in (b"", b"\\x12\\x20" + bytes(32)):
            forged = rpc_pb2.Message(from_id=stranger, seqno=bytes(8), data=b"x", topicIDs=[order["topic"]],
                                     key=b"no key", signature=b"none")
            await send(mesh, victim, rpc_pb2.RPC(publish=[forged]).SerializeToString())
        await send(mesh, victim, b"\\xff\\xff\\xff")
        for message in order["messages"]:
            await mesh.pubsub.publish(order["topic"], bytes.fromhex(message))
        await trio.to_thread.run_sync(sys.stdin.read)

async def send(mesh, victim, rpc):
    stream = await mesh.host.new_stream(victim.peer_id, ["/meshsub/1.2.0"])
    await stream.write(encode_varint_prefixed(rpc))

trio.run(main, json.loads(sys.argv[1]))
"""

PARENT = """
import asyncio
from p2pmodel.gossip.link import GossipLink
from p2pmodel.wire.signing import Key

async def main():
    link = GossipLink(Key.generate(), print)
    await link.start()
    print(link.stats().pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

CHILD = "from p2pmodel.gossip.child import main; main()"

HOLDER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "p2pmodel.gossip.child", sys.argv[1]], pass_fds=[int(sys.argv[1])])
print(child.pid, flush=True)
child.wait()
"""


class Node:
    def __init__(self, listen: str = "/ip4/127.0.0.1/tcp/0") -> None:
        self.key = Key.generate()
        self.received: list[bytes] = []
        self.link = GossipLink(self.key, self.received.append, listen=listen)

    def announcement(self, number: int, model: ModelId = MODEL) -> bytes:
        return self.key.sign("announcement", Announcement(self.key.peer, model, "patch", blob(b"%d" % number)))


@asynccontextmanager
async def swarm(size: int) -> AsyncIterator[list[Node]]:
    """Nodes that know the one before them: a chain, so that messages have to be forwarded."""
    nodes = [Node() for _ in range(size)]
    try:
        await asyncio.gather(*(node.link.start([MODEL]) for node in nodes))
        for node, before in zip(nodes[1:], nodes, strict=False):
            await node.link.connect(before.link.addresses)
        yield nodes
    finally:
        await asyncio.gather(*(node.link.stop() for node in nodes))


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which waits for a parent to ask, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def python(program: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        pass_fds=pass_fds,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_every_node_gets_every_announcement_once_though_it_went_out_before_the_mesh_was_there(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with swarm(3) as nodes:
        sent = {node.link.peer: [node.announcement(n) for n in range(5)] for node in nodes}
        await asyncio.gather(*(node.link.publish(MODEL, data) for node in nodes for data in sent[node.link.peer]))
        for node in nodes:
            others = {data for peer, records in sent.items() if peer != node.link.peer for data in records}
            await soon(partial(others.issubset, node.received))

        first = nodes[0]
        await first.link.publish(MODEL, sent[first.link.peer][0])  # again: nobody is told twice
        last = first.announcement(99)
        await first.link.publish(MODEL, last)
        await soon(lambda: all(last in node.received for node in nodes[1:]))
        for node in nodes:
            assert len(node.received) == len(set(node.received))
            assert not set(node.received) & set(sent[node.link.peer])
            stats = node.link.stats()
            assert (stats.received, stats.refused, stats.restarts) == (len(node.received), {}, 0)
        assert first.link.stats().sent == 7
        await soon(lambda: nodes[1].link.stats().peers == 2)

        with pytest.raises(ValueError, match="4096"):
            await first.link.publish(MODEL, bytes(4097))
        with pytest.raises(Rejected) as refused:
            await first.link.publish(MODEL, first.announcement(1, OTHER))
        assert refused.value.reason == "model"
        with pytest.raises(ValueError, match="topic"):
            await first.link.subscribe("no digest")
        pids = [node.link.stats().pid for node in nodes]
    assert not any(alive(pid) for pid in pids if pid)
    with pytest.raises(NotRunning):
        await first.link.publish(MODEL, last)
    assert capfd.readouterr().err == ""


async def test_what_a_rogue_peer_sends_is_refused_and_harms_nobody() -> None:
    async with swarm(1) as (node,):
        rogue = Key.generate()
        good = rogue.sign("announcement", Announcement(rogue.peer, MODEL, "patch", blob()))
        other = rogue.sign("announcement", Announcement(rogue.peer, OTHER, "patch", blob()))
        tampered = good[:-1] + bytes([good[-1] ^ 1])
        order = {
            "seed": rogue.to_libp2p()[4:36].hex(),
            "address": node.link.addresses[0],
            "topic": f"p2pmodel/1/{MODEL}",
            "messages": [data.hex() for data in (tampered, other, bytes(5000), good)],
        }
        with python(ROGUE, json.dumps(order)):
            wanted = {"signature": 1, "model": 1, "size": 1, "origin": 2, "rpc": 1}
            await soon(lambda: node.received and node.link.stats().refused == wanted)
        assert node.received == [good]
        assert node.link.stats().restarts == 0


async def test_a_killed_child_is_restarted_and_gossips_again() -> None:
    async with swarm(2) as (first, second):
        await soon(lambda: first.link.stats().peers == 1)
        addresses, pid = second.link.addresses, second.link.stats().pid
        assert pid is not None
        os.kill(pid, signal.SIGINT)  # what Ctrl-C sends to everyone in the foreground
        greeting = second.announcement(1)
        await second.link.publish(MODEL, greeting)
        await soon(lambda: greeting in first.received)
        assert second.link.stats().restarts == 0

        os.kill(pid, signal.SIGKILL)
        await soon(lambda: second.link.stats().pid != pid)
        meanwhile = second.announcement(2)
        await second.link.publish(MODEL, meanwhile)  # waits for the new child
        assert second.link.stats().restarts == 1
        assert second.link.stats().pid not in (None, pid)
        assert second.link.addresses == addresses

        answer = first.announcement(3)
        await first.link.publish(MODEL, answer)
        await soon(lambda: answer in second.received and meanwhile in first.received)
        assert second.link.stats().sent == 2


async def test_a_taken_port_and_a_bad_address_are_said_at_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Busy, match="cannot listen"):
        await Node(f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}").link.start()
    node = Node("/ip4/127.0.0.1/udp/0")
    with pytest.raises(UsageError, match="not an address to listen on"):
        await node.link.start()
    assert node.link.stats().pid is None


async def test_unreachable_peers_are_passed_over() -> None:
    async with swarm(2) as (first, second):
        nobody = Key.generate().peer
        await first.link.connect(
            ["", "no address", "/ip4/127.0.0.1/tcp/9", f"/ip4/127.0.0.1/tcp/9/p2p/{nobody}", *first.link.addresses]
        )
        greeting = first.announcement(1)
        await first.link.publish(MODEL, greeting)
        await soon(lambda: greeting in second.received)
        assert first.link.stats().restarts == 0


async def test_a_killed_node_leaves_no_child() -> None:
    with python(PARENT) as parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        assert alive(pid)
        parent.kill()
        await soon(lambda: not alive(pid))


async def test_the_end_of_the_socket_ends_the_child() -> None:
    ours, theirs = socket.socketpair()
    with python(CHILD, str(theirs.fileno()), pass_fds=(theirs.fileno(),)) as child:
        theirs.close()
        with ours:
            ours.sendall(frames.encode(frames.Start(Key.generate().to_libp2p(), "/ip4/127.0.0.1/tcp/0")))
            assert await asyncio.to_thread(ours.recv, 1)  # it is up
            assert alive(child.pid)
        await soon(lambda: not alive(child.pid))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
async def test_the_death_of_the_parent_ends_the_child_though_its_socket_stays_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, python(HOLDER, str(theirs.fileno()), pass_fds=(theirs.fileno(),)) as holder:
        theirs.close()
        ours.sendall(frames.encode(frames.Start(Key.generate().to_libp2p(), "/ip4/127.0.0.1/tcp/0")))
        assert holder.stdout is not None
        pid = int(await asyncio.to_thread(holder.stdout.readline))
        assert await asyncio.to_thread(ours.recv, 1)  # it is up
        holder.kill()
        await soon(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("p2pmodel.gossip.link", ["torch", "hivemind", "libp2p", "trio"]),
        ("p2pmodel.gossip.service", ["torch", "hivemind"]),
    ],
)
def test_each_side_imports_no_more_than_its_own(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
