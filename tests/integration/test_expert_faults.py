"""What a trunk does with hosts and rows that are unlucky, or hostile. The hosts are threads at the other ends of socket
pairs; each answers as it should, or as a test says."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pmodel.domain.errors import PeerFailed, Rejected, Unreachable
from p2pmodel.domain.experts import ExpertCall, ExpertLease
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Span
from p2pmodel.engine import experts as expert_shards
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.engine.expert_calls import Pairs, encode_call
from p2pmodel.engine.experts import load_experts
from p2pmodel.engine.remote_experts import ForwardContext
from p2pmodel.engine.shard_runner import HostedExperts, ShardRunner
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.hosting import forwarding
from p2pmodel.node.hosting.dispatching import Dispatcher
from p2pmodel.swarm.expert_link import ExpertLink
from p2pmodel.swarm.framing import Frame, FrameReader
from p2pmodel.swarm.opening import Failure
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import MAX_META_BYTES, Kind
from p2pmodel.wire.signing import Key
from tests.support.experts import EXPERTS, save_experts
from tests.support.waiting import until

MODEL = canonical.digest(b"model")
LAYER, ROWS, CHOSEN = 1, 6, 4
CODEC = get_codec("fp32")
GOODBYE = Failure.of(PeerFailed("It closed a stream that was idle."), Key.generate().peer).frame()

Answer = Callable[[Frame], bytes]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ShardRunner:
    folder = tmp_path_factory.mktemp("experts")
    save_experts("qwen3_moe", folder)
    checkpoint = read_checkpoint(folder)
    shard = load_experts(checkpoint, Span(0, checkpoint.layers), range(EXPERTS))
    table = VersionTable(shard)
    table.put(MODEL, {})
    return ShardRunner(HostedExperts(shard, table), MODEL)


@dataclass
class Peers:
    """A trunk's dispatcher and its hosts, all of which have all experts. ends: the hosts' sockets; failed: whom the
    dispatcher blamed."""

    runner: ShardRunner
    ends: dict[PeerId, socket.socket] = field(default_factory=dict)
    failed: list[PeerId] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher(MODEL, "fp32", spread=False, failed=self.failed.append)

    def host(self, answer: Answer | None = None, *, latency: float = 0.0, **claims: Any) -> ExpertLink:
        """The one of the least latency is asked first."""
        peer, (ours, theirs) = Key.generate().peer, socket.socketpair()
        self.ends[peer] = theirs
        threading.Thread(target=self._serve, args=(theirs, answer or self.right), daemon=True).start()
        lease = ExpertLease(
            peer, MODEL, Span(0, LAYER + 1), tuple(range(EXPERTS)), "fp32", (MODEL,), 1e-5, 0, False, 1e12
        )
        link = ExpertLink(peer, ours, 0.0)
        self.dispatcher.add(link, replace(lease, **claims))
        for helper in self.dispatcher.helpers.values():
            if helper.link is link:
                helper.latency = latency
        return link

    def right(self, frame: Frame) -> bytes:
        (answer,) = self.runner.compute([(CODEC, frame.meta, frame.body)])
        assert not isinstance(answer, Exception), answer
        size = memoryview(answer).nbytes
        return frames.pack(Kind.DATA, b"", size, frame.position, frame.tokens) + bytes(answer)

    def _serve(self, stream: socket.socket, answer: Answer) -> None:
        reader, scratch = FrameReader(), memoryview(bytearray(1 << 16))
        try:
            while True:
                for frame in reader.read(stream, scratch):
                    if frame.kind is Kind.DATA:
                        stream.sendall(answer(frame))
        except (OSError, EOFError):
            stream.close()

    def ask(self, rows: Tensor, experts: Tensor, gates: Tensor, meanwhile: Callable[[], object] = int) -> Tensor:
        return self.dispatcher.sums(LAYER, rows, experts, gates, ForwardContext(), meanwhile)

    def gradients(self, rows: Tensor, experts: Tensor, gates: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        return self.dispatcher.gradients(LAYER, rows, experts, gates, outer, ForwardContext())

    def expected(self, rows: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        row = torch.arange(len(rows)).repeat_interleave(CHOSEN)
        shard = self.runner._hosted[0].shard
        return shard.compute(LAYER, rows, Pairs(row, experts.reshape(-1), gates.reshape(-1)))

    def work(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        experts = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(ROWS)])
        rows = torch.randn(ROWS, self.runner._hosted[0].shard.width, generator=generator)
        return rows, experts, torch.rand(ROWS, CHOSEN, generator=generator) + 0.1

    @property
    def linked(self) -> int:
        return len(self.dispatcher.helpers)


@pytest.fixture
def peers(runner: ShardRunner) -> Iterator[Peers]:
    found = Peers(runner)
    yield found
    found.dispatcher.close()
    for end in found.ends.values():
        end.close()


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def silence(_: Frame) -> bytes:
    return b""


class TestLinksThatEnd:
    def test_a_last_word_on_a_link_that_owes_nothing_is_its_end(self, peers: Peers) -> None:
        link = peers.host()
        assert close(peers.ask(*peers.work()), peers.expected(*peers.work()))
        assert not link.is_over()
        peers.ends[link.peer].sendall(GOODBYE)
        assert peers.dispatcher.check() == [link]
        assert not peers.linked
        assert not peers.failed

    def test_an_answer_that_is_owed_is_not(self, peers: Peers) -> None:
        link = peers.host()
        seen: list[bool] = []

        def look() -> None:
            until(lambda: peers.runner.rows and _has_data(link))
            seen.append(link.is_over())
            seen.append(bool(peers.dispatcher.check()))

        before, peers.runner.rows = peers.runner.rows, 0
        peers.ask(*peers.work(), look)
        peers.runner.rows += before
        assert seen == [False, False]

    def test_what_a_broken_forward_left_behind_hides_no_end(self, peers: Peers) -> None:
        link = peers.host()
        with pytest.raises(ZeroDivisionError):
            peers.ask(*peers.work(), lambda: 1 / 0)
        until(lambda: _has_data(link))
        assert not peers.dispatcher.check()
        assert not link._asked
        peers.ends[link.peer].sendall(GOODBYE)
        assert peers.dispatcher.check() == [link]

    def test_an_idle_trunk_keeps_no_descriptor_of_them(self, peers: Peers) -> None:
        links = [peers.host() for _ in range(3)]
        for link in links:
            peers.ends[link.peer].sendall(GOODBYE)
        assert len(peers.dispatcher.check()) == 3
        assert all(link.stream.fileno() == -1 for link in links)

    def test_a_link_that_is_replaced_under_a_forward_stays_until_its_end(self, peers: Peers) -> None:
        link = peers.host()
        lease = peers.dispatcher.helpers[link.peer].lease

        def renew() -> None:
            ours, peers.ends[link.peer] = socket.socketpair()
            peers.dispatcher.add(ExpertLink(link.peer, ours, 0.0), lease)
            assert link.stream.fileno() >= 0

        assert close(peers.ask(*peers.work(), renew), peers.expected(*peers.work()))
        assert link.stream.fileno() == -1
        assert peers.linked == 1
        assert not peers.failed

    def test_what_cannot_be_sent_leaves_a_link_in_step(self, peers: Peers) -> None:
        link = peers.host()
        with pytest.raises(Rejected):
            link.send(bytes(MAX_META_BYTES + 1), b"", 1, 0)
        assert close(peers.ask(*peers.work()), peers.expected(*peers.work()))
        assert not peers.failed

    def test_links_that_come_after_the_end_are_closed(self, peers: Peers) -> None:
        peers.dispatcher.close()
        assert peers.host().stream.fileno() == -1


class TestNumbersThatAreNotFinite:
    def test_a_row_keeps_to_itself(self, peers: Peers) -> None:
        peers.host()
        peers.host()
        rows, experts, gates = peers.work()
        expected = peers.expected(rows, experts, gates)
        rows[1, 3], gates[4, 2] = torch.inf, torch.nan
        found = peers.ask(rows, experts, gates)
        good = torch.tensor([0, 2, 3, 5])
        assert close(found[good], expected[good])
        assert found[[1, 4]].isnan().all()
        assert peers.linked == 2

    @pytest.mark.parametrize("hosts", [1, 2])
    def test_sums_that_overflow_are_nobodys_fault(self, peers: Peers, hosts: int) -> None:
        for _ in range(hosts):
            peers.host()
        rows, experts, gates = peers.work()
        expected = peers.expected(rows, experts, gates)
        gates[2] = 3e38
        rows[2] *= 100
        found = peers.ask(rows, experts, gates)
        good = torch.tensor([0, 1, 3, 4, 5])
        assert close(found[good], expected[good])
        assert not found[2].isfinite().all()
        assert not peers.failed
        assert peers.linked == hosts

    @pytest.mark.parametrize("most", [torch.inf, 3e38], ids=["before", "there"])
    @pytest.mark.parametrize("hosts", [1, 3])
    def test_gradients_that_overflow_cost_the_session_and_no_host(self, peers: Peers, hosts: int, most: float) -> None:
        for _ in range(hosts):
            peers.host()
        rows, experts, gates = peers.work()
        with pytest.raises(Rejected, match="not finite"):
            peers.gradients(100 * rows, experts, gates + 9, torch.full(rows.shape, most))
        assert not peers.failed
        assert peers.linked == hosts
        assert close(peers.ask(rows, experts, gates), peers.expected(rows, experts, gates))

    def test_a_host_whose_answers_others_do_not_share_is_blamed(self, peers: Peers) -> None:
        liar = peers.host(lambda frame: _as_nan(peers.right(frame)))
        peers.host(latency=0.1)
        work = peers.work()
        outer = torch.ones_like(work[0])
        of_rows, of_gates = peers.gradients(*work, outer)
        assert of_rows.isfinite().all()
        assert of_gates.isfinite().all()
        assert peers.failed == [liar.peer]
        assert close(peers.ask(*work), peers.expected(*work))

    def test_a_liar_that_is_asked_what_another_is_right_about_blames_nobody(self, peers: Peers) -> None:
        peers.host()
        liar = peers.host(lambda _: b"\xff" * 64, latency=0.1)
        rows, experts, gates = peers.work()
        gates[2] = 3e38
        rows[2] *= 100
        assert not peers.ask(rows, experts, gates)[2].isfinite().all()
        assert peers.failed == [liar.peer]


class TestForwardsThatBreakOff:
    def test_their_answers_are_nobodys(self, peers: Peers) -> None:
        peers.host()
        for seed in range(3):
            with pytest.raises(ZeroDivisionError):
                peers.ask(*peers.work(seed), lambda: 1 / 0)
            assert close(peers.ask(*peers.work(9)), peers.expected(*peers.work(9)))

    def test_when_the_host_fails_then_nothing_of_them_is_asked_again(self, peers: Peers) -> None:
        link = peers.host(silence)
        with pytest.raises(ZeroDivisionError):
            peers.ask(*peers.work(1), lambda: 1 / 0)
        before = peers.dispatcher.stats

        def fail() -> None:
            peers.host(latency=9.0)
            peers.ends[link.peer].shutdown(socket.SHUT_RDWR)

        assert close(peers.ask(*peers.work(), fail), peers.expected(*peers.work()))
        assert peers.dispatcher.stats.retries == before.retries + 1


class TestDeadlines:
    def test_what_a_peer_says_of_its_speed_keeps_nobody_for_long(
        self, peers: Peers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(forwarding, "MOST_SECONDS", 0.2)
        monkeypatch.setattr(forwarding, "DEADLINE_SECONDS", 0.2)
        for _ in range(2):
            link = peers.host(silence)
            helper = peers.dispatcher.helpers[link.peer]
            object.__setattr__(helper.lease, "pair_seconds", 1e300)
        began = time.monotonic()
        with pytest.raises(Unreachable):
            peers.ask(*peers.work())
        assert time.monotonic() - began < 5.0
        assert len(peers.failed) == 2

    def test_who_is_alone_has_the_time_that_its_pairs_take(self, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forwarding, "DEADLINE_SECONDS", 0.05)
        released = threading.Event()

        def late(frame: Frame) -> bytes:
            released.wait(30)
            return peers.right(frame)

        peers.host(late, pair_seconds=0.05)
        timer = threading.Timer(0.3, released.set)
        timer.start()
        assert close(peers.ask(*peers.work()), peers.expected(*peers.work()))
        timer.join()
        assert not peers.failed

    def test_each_of_several_calls_has_its_own(self, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forwarding, "DEADLINE_SECONDS", 1.2)
        monkeypatch.setattr(forwarding, "MAX_CALL_ROWS", 1)

        def slow(frame: Frame) -> bytes:
            threading.Event().wait(0.25)
            return peers.right(frame)

        peers.host(slow)
        assert close(peers.ask(*peers.work()), peers.expected(*peers.work()))
        assert not peers.failed


def test_calls_of_many_rows_share_no_forward(runner: ShardRunner) -> None:
    width = runner._hosted[0].shard.width

    def call(count: int) -> tuple[Any, bytes, bytes]:
        pairs = Pairs(torch.arange(count), torch.zeros(count, dtype=torch.long), torch.ones(count))
        body = encode_call(CODEC, torch.ones(count, width), pairs)
        return CODEC, canonical.encode(ExpertCall(LAYER, MODEL, count, count)), body

    before = runner.forwards
    answers = runner.compute([call(count) for count in (500, 500, 500, 24)])
    assert [memoryview(a).nbytes for a in answers if not isinstance(a, Exception)] == [
        4 * width * count for count in (500, 500, 500, 24)
    ]
    assert runner.forwards == before + 2


def test_gradients_in_parts_are_those_of_the_whole(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.host()
    work, outer = peers.work(), torch.ones(ROWS, peers.work()[0].shape[1])
    whole = peers.gradients(*work, outer)
    monkeypatch.setattr(expert_shards, "PAIRS_AT_ONCE", 5)
    for ours, theirs in zip(peers.gradients(*work, outer), whole, strict=True):
        assert close(ours, theirs)


def _has_data(link: ExpertLink) -> bool:
    try:
        return bool(link.stream.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _as_nan(answer: bytes) -> bytes:
    return answer[: frames.HEADER.size] + b"\xff" * (len(answer) - frames.HEADER.size)
