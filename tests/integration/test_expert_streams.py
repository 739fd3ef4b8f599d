"""Rows that go to expert hosts over real streams: replicas, faults, and what is refused.

One model of 8 experts; the hosts, the trunk's dispatcher and their daemons are in this process.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pmodel.domain.errors import NotFound, PeerFailed, Rejected, Unreachable
from p2pmodel.domain.experts import MAX_CALL_ROWS, ExpertCall, ExpertLease, ExpertOpening
from p2pmodel.domain.ids import ModelId, PeerId
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import Checkpoint, read_checkpoint
from p2pmodel.engine.expert_calls import Pairs, encode_call
from p2pmodel.engine.experts import ExpertShard, load_experts
from p2pmodel.engine.remote_experts import ForwardContext
from p2pmodel.engine.shard_runner import HostedExperts, ShardRunner
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.hosting import forwarding
from p2pmodel.node.hosting.dispatching import Dispatcher
from p2pmodel.swarm.expert_link import ExpertLink, Switch
from p2pmodel.swarm.expert_server import ExpertServer
from p2pmodel.swarm.expert_streams import EXPERTS
from p2pmodel.swarm.framing import FrameReader
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.streams import Listener
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind
from tests.support.experts import save_experts
from tests.support.swarm import swarm

pytestmark = pytest.mark.timeout(120)
MODEL = canonical.digest(b"model")
LAYER, ROWS = 1, 12
SHARES = ((0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (0, 1, 6, 7))


@dataclass
class Setting:
    """Four expert hosts; every expert has two of them. failed: peers that the dispatcher blamed."""

    checkpoint: Checkpoint
    trunk: PeerHost
    hosts: list[PeerHost]
    servers: list[ExpertServer]
    runners: list[ShardRunner]
    whole: ExpertShard
    failed: list[PeerId] = field(default_factory=list)

    def dispatcher(self, *numbers: int, spread: bool = False) -> Dispatcher:
        found = Dispatcher(MODEL, "fp32", spread=spread, failed=self.failed.append)
        for number in numbers:
            found.add(self.link(number), self.lease(number))
        return found

    def link(self, number: int, model: ModelId = MODEL) -> ExpertLink:
        return ExpertLink.open(self.trunk, self.hosts[number].peer, ExpertOpening(model, "fp32"))

    def lease(self, number: int) -> ExpertLease:
        everything = Span(0, self.checkpoint.layers)
        return ExpertLease(
            self.hosts[number].peer, MODEL, everything, SHARES[number], "fp32", (MODEL,), 1e-5, 0, False, 1e12
        )

    def work(self, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        experts = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(rows)])
        gates = torch.rand(rows, 4, generator=generator) + 0.1
        return torch.randn(rows, self.checkpoint.hidden_size, generator=generator), experts, gates

    def expected(self, rows: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        row = torch.arange(len(rows)).repeat_interleave(experts.shape[1])
        return self.whole.compute(LAYER, rows, Pairs(row, experts.reshape(-1), gates.reshape(-1)))


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    save_experts("qwen3_moe", tmp_path / "model")
    checkpoint = read_checkpoint(tmp_path / "model")
    everything = Span(0, checkpoint.layers)
    (tmp_path / "keys").mkdir()
    async with swarm(tmp_path / "keys", 5) as members:
        (_, trunk), *others = members
        runners, servers = [], []
        for (_, host), share in zip(others, SHARES, strict=True):
            await trunk.connect(host.peer, host.addresses)
            shard = load_experts(checkpoint, everything, share)
            table = VersionTable(shard)
            table.put(MODEL, {})
            runners.append(ShardRunner(HostedExperts(shard, table), MODEL))
            servers.append(ExpertServer(host, runners[-1]))
            await asyncio.to_thread(servers[-1].start)
        whole = load_experts(checkpoint, everything, range(8))
        yield Setting(checkpoint, trunk, [host for _, host in others], servers, runners, whole)
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))


async def ask(dispatcher: Dispatcher, rows: Tensor, experts: Tensor, gates: Tensor, context: Any = None) -> Tensor:
    def work() -> Tensor:
        return dispatcher.sums(LAYER, rows, experts, gates, context or ForwardContext())

    return await asyncio.to_thread(work)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max())))


class Impostor:
    """Takes streams for experts in the place of a server, and answers calls as it likes."""

    def __init__(self, host: PeerHost, answer: Callable[[Any], bytes]) -> None:
        self._listener = Listener(host, EXPERTS)
        self._answer = answer
        self._streams: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except EOFError:
                return
            self._streams.append(stream)
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        reader, scratch = FrameReader(), memoryview(bytearray(1 << 16))
        try:
            while True:
                for frame in reader.read(stream, scratch):
                    if frame.kind is Kind.CLOSE:
                        return
                    stream.sendall(frames.pack(Kind.OPEN) if frame.kind is Kind.OPEN else self._answer(frame))
        except (OSError, EOFError):
            stream.close()

    def close(self) -> None:
        self._listener.close()
        for stream in self._streams:
            stream.close()


async def test_sums_are_those_of_one_peer_that_has_all(setting: Setting) -> None:
    dispatcher = setting.dispatcher(0, 1, 2, 3)
    for rows in (1, ROWS, MAX_CALL_ROWS + 7):
        work = setting.work(rows)
        assert close(await ask(dispatcher, *work), setting.expected(*work))
    assert sum(runner.rows for runner in setting.runners) == dispatcher.stats.rows
    assert sum(runner.pairs for runner in setting.runners) == 4 * (1 + ROWS + MAX_CALL_ROWS + 7)
    assert dispatcher.stats.retries == 0
    dispatcher.close()


async def test_gradients_are_those_of_one_peer_that_has_all(setting: Setting) -> None:
    dispatcher = setting.dispatcher(0, 1, 2, 3)
    rows, experts, gates = setting.work()
    outer = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    context = ForwardContext()
    of_rows, of_gates = await asyncio.to_thread(dispatcher.gradients, LAYER, rows, experts, gates, outer, context)
    row = torch.arange(ROWS).repeat_interleave(4)
    expected = setting.whole.gradients(LAYER, rows, Pairs(row, experts.reshape(-1), gates.reshape(-1)), outer)
    assert close(of_rows, expected[0])
    assert close(of_gates.reshape(-1), expected[1])
    dispatcher.close()


async def test_trunks_that_ask_at_once_share_forwards(setting: Setting) -> None:
    dispatchers = [setting.dispatcher(0, 2) for _ in range(4)]
    works = [setting.work(rows) for rows in (3, 4, 5, 6)]
    for _ in range(10):
        answers = await asyncio.gather(*(ask(d, *work) for d, work in zip(dispatchers, works, strict=True)))
        for answer, work in zip(answers, works, strict=True):
            assert close(answer, setting.expected(*work))
    assert setting.runners[0].forwards < 40
    assert setting.servers[0].stats.trunks == 4
    for dispatcher in dispatchers:
        dispatcher.close()


async def test_a_host_that_goes_costs_a_retry(setting: Setting) -> None:
    dispatcher = setting.dispatcher(0, 1, 2, 3)
    work = setting.work()
    expected = setting.expected(*work)
    assert close(await ask(dispatcher, *work), expected)
    await asyncio.to_thread(setting.servers[1].stop)
    await setting.hosts[3].p2p.end()
    assert close(await ask(dispatcher, *work), expected)
    assert set(setting.failed) <= {setting.hosts[1].peer, setting.hosts[3].peer}
    assert close(await ask(dispatcher, *work), expected)
    dispatcher.close()


def garbage(frame: Any) -> bytes:
    return frames.pack(Kind.DATA, b"", 4, frame.position, frame.tokens) + b"what"


def not_finite(frame: Any) -> bytes:
    rows = canonical.decode(frame.meta, ExpertCall, 1000).rows
    body = torch.full((rows, 32), torch.nan).numpy().tobytes()
    return frames.pack(Kind.DATA, b"", len(body), frame.position, frame.tokens) + body


def unasked(frame: Any) -> bytes:
    return frames.pack(Kind.DATA, b"", 0, frame.position + 5, frame.tokens)


def malformed(frame: Any) -> bytes:
    return b"\xff" * 64


def silence(frame: Any) -> bytes:
    return b""


@pytest.mark.parametrize("answer", [garbage, not_finite, unasked, malformed, silence])
async def test_nonsense_is_blamed_and_asked_for_elsewhere(setting: Setting, answer: Callable[[Any], bytes]) -> None:
    await asyncio.to_thread(setting.servers[0].stop)
    impostor = Impostor(setting.hosts[0], answer)
    dispatcher = setting.dispatcher(0, 1, 2, 3)
    dispatcher.helpers[setting.hosts[0].peer].latency = 0.0  # it looks like the fastest
    for other in (1, 2, 3):
        dispatcher.helpers[setting.hosts[other].peer].latency = 0.01
    work = setting.work()
    assert close(await ask(dispatcher, *work), setting.expected(*work))
    assert setting.failed == [setting.hosts[0].peer]
    assert dispatcher.stats.retries > 0
    assert close(await ask(dispatcher, *work), setting.expected(*work))
    dispatcher.close()
    impostor.close()


async def test_an_expert_without_a_host_is_named(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = setting.dispatcher(0, 1)
    work = setting.work()
    with pytest.raises(Unreachable, match="expert 6 of layer 1 and 1 more"):
        await ask(dispatcher, *work)
    monkeypatch.setattr(forwarding, "DEADLINE_SECONDS", 0.3)
    await asyncio.to_thread(setting.servers[2].stop)
    impostor = Impostor(setting.hosts[2], silence)
    dispatcher.add(setting.link(2), setting.lease(2))
    with pytest.raises(Unreachable, match="of layer 1"):
        await ask(dispatcher, *work)
    assert setting.hosts[2].peer in setting.failed
    only = torch.tensor([[0, 1, 2, 3]])
    rows, _, gates = setting.work(1)
    assert close(await ask(dispatcher, rows, only, gates), setting.expected(rows, only, gates))
    dispatcher.close()
    impostor.close()


async def test_by_policy_its_weight_is_spread(setting: Setting) -> None:
    dispatcher = setting.dispatcher(0, 1, spread=True)
    rows, experts, gates = setting.work()
    context = ForwardContext()
    found = await ask(dispatcher, rows, experts, gates, context)
    lost = experts >= 6
    left = gates.masked_fill(lost, 0.0)
    left = left * (gates.sum(1) / left.sum(1)).unsqueeze(1)
    assert close(found, setting.expected(rows, experts, left))
    assert context.spread is not None
    assert torch.equal(context.spread, lost.sum(1))
    dispatcher.close()


async def test_rows_that_are_not_finite_blame_nobody(setting: Setting) -> None:
    dispatcher = setting.dispatcher(0, 1, 2, 3)
    rows, experts, gates = setting.work()
    with pytest.raises(Rejected, match="not finite"):
        await ask(dispatcher, rows / 0.0, experts, gates)
    assert not setting.failed
    dispatcher.close()


def test_experts_that_are_exchanged_are_computed_until_they_are_dropped(tmp_path: Path) -> None:
    save_experts("qwen3_moe", tmp_path)
    checkpoint = read_checkpoint(tmp_path)

    def hosted(experts: range) -> HostedExperts:
        shard = load_experts(checkpoint, Span(0, checkpoint.layers), experts)
        table = VersionTable(shard)
        table.put(MODEL, {})
        return HostedExperts(shard, table)

    before, after, whole = hosted(range(4)), hosted(range(2, 6)), hosted(range(8)).shard
    runner, codec = ShardRunner(before, MODEL), get_codec("fp32")
    rows = torch.randn(1, checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))

    def asked(expert: int) -> bool:
        pairs = Pairs(torch.tensor([0]), torch.tensor([expert]), torch.ones(1))
        meta = canonical.encode(ExpertCall(LAYER, MODEL, 1, 1))
        (answer,) = runner.compute([(codec, meta, encode_call(codec, rows, pairs))])
        if isinstance(answer, NotFound):
            return False
        assert not isinstance(answer, Exception)
        assert torch.equal(codec.decode(answer, 1, rows.shape[1])[0], whole.compute(LAYER, rows, pairs))
        return True

    assert [asked(expert) for expert in (0, 3, 5)] == [True, True, False]
    runner.take(after)
    assert [asked(expert) for expert in (0, 3, 5, 6)] == [True, True, True, False]
    runner.drop(before)
    assert [asked(expert) for expert in (0, 3, 5)] == [False, True, True]
    assert runner.loads == {0: 2, 3: 3, 5: 2}


async def test_what_a_host_refuses(setting: Setting) -> None:
    with pytest.raises(PeerFailed, match="another model"):
        await asyncio.to_thread(setting.link, 0, canonical.digest(b"other"))
    width = setting.checkpoint.hidden_size
    one = torch.zeros(1, dtype=torch.long)
    pair = Pairs(one, one, torch.ones(1))
    whole = ExpertCall(LAYER, MODEL, 1, 1)

    def said(meta: bytes, body: bytes) -> str:
        link, switch = setting.link(0), Switch()
        link.send(meta, body, 1, 1000)
        while link.failed is None:
            switch.wait([link], 5.0)
            assert not link.take()
        return link.failed.message

    async def refuses(meta: Any, body: bytes, why: str) -> None:
        encoded = meta if isinstance(meta, bytes) else canonical.encode(meta)
        assert why in await asyncio.to_thread(said, encoded, body)

    codec = get_codec("fp32")
    good = encode_call(codec, torch.zeros(1, width), pair)
    await refuses(whole, encode_call(codec, torch.zeros(1, width + 1), pair), "no 1 rows of width")
    await refuses(whole, good[:-1], "no 1 rows of width")
    await refuses(whole, encode_call(codec, torch.full((1, width), torch.inf), pair), "not finite")
    await refuses(whole, encode_call(codec, torch.zeros(1, width), Pairs(one, one, one / 0.0)), "not finite")
    await refuses(whole, encode_call(codec, torch.zeros(1, width), Pairs(one + 1, one, one)), "a row that it does not")
    await refuses(whole, encode_call(codec, torch.zeros(1, width), Pairs(one, one + 6, one)), "hosts experts 0-3")
    often = one.repeat(5)
    crowd = encode_call(codec, torch.zeros(1, width), Pairs(often, often, torch.ones(5)))
    await refuses(ExpertCall(LAYER, MODEL, 1, 5), crowd, "more experts of its rows")
    await refuses(ExpertCall(99, MODEL, 1, 1), good, "no experts of layer 99")
    await refuses(ExpertCall(LAYER, canonical.digest(b"v"), 1, 1), good, "is not served here")
    await refuses(b"", good, "no valid ExpertCall")
    for change in ({"rows": MAX_CALL_ROWS + 1, "pairs": MAX_CALL_ROWS + 1}, {"pairs": 0}, {"layer": -1}):
        oversized = {"layer": LAYER, "version": MODEL, "rows": 1, "pairs": 1, "gradients": False} | change
        await refuses(canonical.encode(oversized), good, "no valid ExpertCall")
    assert setting.runners[0].rows == 0
    with pytest.raises(NotFound):
        setting.whole.check(99, pair)
