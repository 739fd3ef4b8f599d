"""An expert host whose trunks want too much: streams, bytes, and patience. Trunk and host are one peer, so that one
daemon is enough."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from p2pmodel.domain.errors import PeerFailed
from p2pmodel.domain.experts import MAX_CALL_ROWS, ExpertCall, ExpertOpening
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.engine.expert_calls import Pairs, encode_call
from p2pmodel.engine.experts import load_experts
from p2pmodel.engine.shard_runner import HostedExperts, ShardRunner
from p2pmodel.engine.versions import VersionTable
from p2pmodel.swarm import expert_admission, expert_server
from p2pmodel.swarm.expert_link import ExpertLink, Switch
from p2pmodel.swarm.expert_server import ExpertServer
from p2pmodel.swarm.expert_streams import EXPERTS, HANDSHAKE_SECONDS
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.streams import open_stream
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind
from tests.support.experts import EXPERTS as MANY
from tests.support.experts import save_experts
from tests.support.swarm import swarm
from tests.support.waiting import soon

MODEL = canonical.digest(b"model")
CODEC = get_codec("fp32")


@dataclass
class Serving:
    host: PeerHost
    server: ExpertServer
    runner: ShardRunner

    @property
    def most(self) -> int:
        return self.runner.max_body(CODEC)

    async def link(self) -> ExpertLink:
        opening = ExpertOpening(MODEL, "fp32")
        return await asyncio.to_thread(ExpertLink.open, self.host, PeerId(self.host.peer), opening)

    async def stream(self) -> socket.socket:
        """Of whom the host knows nothing yet."""
        return await asyncio.to_thread(open_stream, self.host, PeerId(self.host.peer), EXPERTS)

    async def is_right(self, link: ExpertLink, rows: int = 2) -> bool:
        width = self.runner._hosted[0].shard.width
        pairs = Pairs(torch.arange(rows), torch.zeros(rows, dtype=torch.long), torch.ones(rows))
        hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
        body = encode_call(CODEC, hidden, pairs)
        link.send(canonical.encode(ExpertCall(1, MODEL, rows, rows)), body, rows, len(body))
        answer = CODEC.decode(await asyncio.to_thread(wait, link), rows, width)[0]
        return torch.allclose(answer, self.runner._hosted[0].shard.compute(1, hidden, pairs), atol=1e-5)


def wait(link: ExpertLink) -> bytes:
    """The next answer."""
    switch = Switch()
    while not (found := link.take()):
        if link.failed is not None:
            raise link.failed
        switch.wait([link], 5.0)
    return bytes(found[0])


async def end_of(link: ExpertLink) -> str:
    """Why the host ended it."""
    switch = Switch()
    while link.failed is None:
        await asyncio.to_thread(switch.wait, [link], 5.0)
    return link.failed.message


@pytest.fixture
async def serving(tmp_path: Path) -> AsyncIterator[Serving]:
    save_experts("qwen3_moe", tmp_path / "model")
    checkpoint = read_checkpoint(tmp_path / "model")
    shard = load_experts(checkpoint, Span(0, checkpoint.layers), range(MANY))
    table = VersionTable(shard)
    table.put(MODEL, {})
    runner = ShardRunner(HostedExperts(shard, table), MODEL)
    async with swarm(tmp_path, 1) as [(_, host)]:
        server = ExpertServer(host, runner)
        await asyncio.to_thread(server.start)
        yield Serving(host, server, runner)
        await asyncio.to_thread(server.stop)


async def test_a_peers_newest_streams_take_the_place_of_its_oldest(serving: Serving) -> None:
    links = [await serving.link() for _ in range(expert_server.MAX_STREAMS_OF_PEER + 2)]
    assert await serving.is_right(links[-1])
    assert serving.server.stats.trunks == expert_server.MAX_STREAMS_OF_PEER
    for link in links[:2]:
        assert "Newer streams" in await end_of(link)
    for link in links[2:]:
        assert await serving.is_right(link)
        link.close()
    await soon(lambda: not serving.server.stats.trunks)
    assert serving.server._seats._value == expert_server.MAX_TRUNKS
    assert not serving.server._held


async def test_those_that_say_nothing_keep_nobody_waiting(serving: Serving) -> None:
    silent = [await serving.stream() for _ in range(3 * expert_admission.MAX_WAITING_OF_PEER)]
    began = time.monotonic()
    await soon(lambda: serving.server._admission._waiting.total() == expert_admission.MAX_WAITING_OF_PEER)
    for stream in silent:
        await asyncio.to_thread(stream.close)
    link = await serving.link()
    assert await serving.is_right(link)
    assert time.monotonic() - began < HANDSHAKE_SECONDS
    link.close()


async def test_a_body_that_no_call_has_is_refused_before_it_comes(serving: Serving) -> None:
    link = await serving.link()
    link.stream.sendall(frames.pack(Kind.DATA, b"", serving.most + 1, 1, 1))
    assert f"{serving.most} are the most" in await end_of(link)
    link = await serving.link()
    assert await serving.is_right(link, MAX_CALL_ROWS)
    link.close()


async def test_a_call_that_never_ends_is_given_up(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_server, "STUCK_SECONDS", 0.2)
    stuck, idle = await serving.link(), await serving.link()
    stuck.stream.sendall(frames.pack(Kind.DATA, b"", serving.most, 1, 1) + bytes(1000))
    assert "stuck" in await end_of(stuck)
    assert await serving.is_right(idle)
    idle.close()


async def test_who_takes_most_of_the_memory_has_to_go(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_server, "MAX_HELD_BYTES", 400_000)
    links = [await serving.link() for _ in range(3)]
    for link, size in zip(links, (100_000, 150_000, 200_000), strict=True):
        link.stream.setblocking(True)
        await asyncio.to_thread(link.stream.sendall, frames.pack(Kind.DATA, b"", serving.most, 1, 1) + bytes(size))
        link.stream.setblocking(False)
    assert "too much" in await end_of(links[2])
    await soon(lambda: serving.server._held < 400_000)
    assert serving.server.stats.trunks == 2
    link = await serving.link()
    assert await serving.is_right(link)


async def test_a_full_host_says_so(serving: Serving) -> None:
    for _ in range(expert_server.MAX_TRUNKS):
        serving.server._seats.acquire()
    with pytest.raises(PeerFailed, match="as many trunks as it can"):
        await serving.link()
    serving.server._seats.release(expert_server.MAX_TRUNKS)
    link = await serving.link()
    assert await serving.is_right(link)
