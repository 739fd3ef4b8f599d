"""Chains of stages over real p2pd daemons: the numbers, the bytes, and whose fault it was.

`python -m tests.integration.test_chain` is a stage in a process of its own, which the tests kill and stop.
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from p2pmodel.domain.errors import Busy, NotFound, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import Hop, Route, SessionRequest, Span
from p2pmodel.swarm.chain_client import SINK_SECONDS, ChainClient, ChainSession
from p2pmodel.swarm.chain_server import ChainServer
from p2pmodel.swarm.framing import SCRATCH_BYTES, Frame, FrameReader, Outbox, receive_frame
from p2pmodel.swarm.membership import Membership
from p2pmodel.swarm.opening import CHAIN, SINK, Failure, Opening
from p2pmodel.swarm.ping import MAX_PINGERS, PING
from p2pmodel.swarm.stage_session import OUTBOX_BYTES
from p2pmodel.swarm.streams import Listener, open_stream
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind
from p2pmodel.wire.signing import Key
from tests.support.waiting import until

MODEL = canonical.digest(b"model")
PATIENCE = 10.0
NOTICED_SECONDS = 5.0
"""The pings take 3.5; the rest is for a busy machine."""
ZEROS = bytes(16)
"""Four numbers in float32."""


@dataclass
class Host:
    p2p: Any
    peer: PeerId
    addresses: list[str]

    @classmethod
    async def start(cls) -> "Host":
        key = Key.generate()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "key"
            file.write_bytes(key.to_libp2p())
            p2p = await P2P.create(identity_path=str(file), check_if_identity_free=False, startup_timeout=60)
        return cls(p2p, key.peer, [str(address) for address in await p2p.get_visible_maddrs()])

    @property
    def membership(self) -> Membership:
        return Membership(None, self.peer)

    async def meet(self, peer: str, addresses: Sequence[str]) -> None:
        ways = [Multiaddr(address.split("/p2p/")[0]) for address in addresses]
        await self.p2p._client.connect(PeerID.from_base58(peer), ways)


@dataclass
class Adder:
    """A stage that adds a constant, in place, to float32 numbers, and what the session has loaded; on the way back it
    multiplies by the constant. A frame's meta can ask for trouble."""

    constant: float
    loaded: dict[str, float] = field(default_factory=dict)
    opened: list[SessionRequest] = field(default_factory=list)
    closed: list[SessionRequest] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def open(self, request: SessionRequest) -> SessionRequest:
        if request.codec == "full" and request.span.start == 1:
            raise Busy("This stage has no room for 7 tokens.", "Ask for less.")
        if request.codec == "unknown":
            raise Rejected("codec", "There is no codec of this name.")
        if request.codec == "defect":
            raise ZeroDivisionError
        self.opened.append(request)
        return request

    def known(self, handle: Any) -> tuple[bytes, ...]:
        return ()

    def step(self, batch: Sequence[tuple[Any, int, bytes, Buffer]]) -> Sequence[Buffer | Exception]:
        self.batches.append(len(batch))
        return [
            Rejected("finite", "The hidden states are not finite.")
            if meta == b"finite" and handle.span.start
            else self._one(meta, body, self.loaded.get(handle.session, 0.0))
            for handle, _, meta, body in batch
        ]

    def load(self, handle: SessionRequest, body: Buffer) -> None:
        if not len(body):
            raise Rejected("schema", "This is no state.")
        self.loaded[handle.session] = float(np.frombuffer(body, np.float32)[0])

    def backward(self, handle: SessionRequest, position: int, body: Buffer) -> Buffer:
        if position == 14 and handle.span.start == 0:
            raise Rejected("finite", "The gradients are not finite.")
        if position == 13:
            raise NotFound("Micro-batch 13 is not kept here any more.")
        numbers = np.frombuffer(body, np.float32) * np.float32(self.constant)
        return numbers.data

    def close(self, handle: SessionRequest) -> None:
        self.closed.append(handle)

    def _one(self, meta: bytes, body: Buffer, more: float) -> Buffer | Exception:
        if meta == b"gate":
            self.entered.set()
            assert self.gate.wait(PATIENCE)
        if meta == b"refuse":
            return Rejected("shape", "These are no hidden states of this model.")
        if meta == b"defect":
            return ZeroDivisionError()
        if meta == b"explode":
            raise ZeroDivisionError
        numbers = np.frombuffer(body, np.float32)
        numbers += self.constant + more
        return numbers.data


@dataclass
class Swarm:
    """`client` has a ChainClient, and `a`, `b`, `c` have servers that add 1, 2 and 4; `spare` has neither."""

    run: Callable[[Any], Any]
    client: Host
    spare: Host
    hosts: dict[str, Host]
    servers: dict[str, ChainServer]
    runners: dict[str, Adder]
    chain: ChainClient

    def open(self, *names: str, codec: str = "fp32", max_tokens: int = 1 << 16, timeout: float = 15.0) -> ChainSession:
        return self.chain.open(self.route(*names), new_request(codec, max_tokens), timeout)

    def open_training(self, *names: str) -> ChainSession:
        return self.chain.open(self.route(*names), new_request(max_tokens=1 << 10, training=True))

    def route(self, *names: str) -> Route:
        return route(*(self.hosts[name].peer for name in names))

    def failed(self) -> int:
        return sum(server.stats().failed for server in self.servers.values())

    def quiet(self) -> bool:
        return all(server.sessions == 0 for server in self.servers.values()) and all(
            sorted(r.session for r in runner.opened) == sorted(r.session for r in runner.closed)
            for runner in self.runners.values()
        )


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Stages `x` and `y`, that add 8, each in a process group with its daemon; they take their time to start."""
    stages = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.integration.test_chain"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for name in ("x", "y")
    }
    yield stages
    for process in stages.values():
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def swarm(started: dict[str, Any]) -> Iterator[Swarm]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    async def start() -> list[Host]:
        hosts = await asyncio.gather(*(Host.start() for _ in range(5)))
        for at, host in enumerate(hosts):
            for other in hosts[:at]:
                await host.meet(other.peer, other.addresses)
        return hosts

    client, spare, a, b, c = run(start())
    hosts = {"a": a, "b": b, "c": c, "client": client, "spare": spare}
    runners = {"a": Adder(1.0), "b": Adder(2.0), "c": Adder(4.0)}
    servers = {name: ChainServer(hosts[name], runner) for name, runner in runners.items()}
    chain = ChainClient(client)
    parts: list[ChainServer | ChainClient] = [*servers.values(), chain]
    for part in parts:
        part.start()
    yield Swarm(run, client, spare, hosts, servers, runners, chain)
    for part in parts:
        part.stop()
    for host in (client, spare, a, b, c):
        run(host.p2p.shutdown())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def processes(swarm: Swarm, started: dict[str, Any]) -> dict[str, Any]:
    for name, process in started.items():
        told = json.loads(process.stdout.readline())
        swarm.hosts[name] = Host(None, PeerId(told["peer"]), told["addresses"])
        for host in swarm.hosts.values():
            if host.p2p is not None:
                swarm.run(host.meet(told["peer"], told["addresses"]))
    return started


def test_fifty_steps_through_three_stages(swarm: Swarm) -> None:
    before, failed = swarm.servers["b"].stats(), swarm.failed()
    session = swarm.open("a", "b", "c")
    for position in range(50):
        numbers = np.arange(64, dtype=np.float32) + position
        meta, body = session.step(numbers.data, position, 1, meta=b"x" * (position % 3))
        assert meta == b"x" * (position % 3)
        np.testing.assert_array_equal(np.frombuffer(body, np.float32), np.arange(64) + position + 7)
    session.close()
    after = swarm.servers["b"].stats()
    assert (after.frames - before.frames, after.tokens - before.tokens) == (50, 50)
    closing = 2 * frames.HEADER.size
    assert session.bytes_sent + session.bytes_received >= 100 * (256 + frames.HEADER.size) + closing
    assert after.bytes_in - before.bytes_in == session.bytes_sent
    assert after.step_seconds > before.step_seconds
    until(swarm.quiet)
    assert swarm.failed() == failed


def test_a_large_body(swarm: Swarm) -> None:
    session = swarm.open("a", "b", "c")
    numbers = np.random.default_rng(0).random(5 * (1 << 20) // 4, np.float32)
    _, body = session.step(numbers.data, 0, 1000)
    expected = numbers + np.float32(1) + np.float32(2) + np.float32(4)
    np.testing.assert_array_equal(np.frombuffer(body, np.float32), expected)
    np.frombuffer(body, np.float32)[0] = 0.0
    session.close()


def test_many_chunks_under_way_at_once(swarm: Swarm) -> None:
    session = swarm.open("a", "b", "c")
    chunk = 1 << 18
    for n in range(12):
        session.send(np.full(chunk, n, np.float32).data, n * 100, 100)
    for n in range(12):
        _, body = session.receive()
        assert (np.frombuffer(body, np.float32) == n + 7).all()
    session.close()


def test_gradients_run_back_while_others_go_forward(swarm: Swarm) -> None:
    session = swarm.open_training("a", "b", "c")
    chunk, count = 1 << 18, 12
    for n in range(count):
        if n == count // 2:
            session.send_state(np.full(1, 100, np.float32).data)
        session.send(np.full(chunk, n, np.float32).data, n, 100)
    for n in range(count):
        _, body = session.receive()
        more = 300 if n >= count // 2 else 0
        assert (np.frombuffer(body, np.float32) == n + 7 + more).all()
        session.send_gradient(np.full(chunk, n, np.float32).data, n)
    for n in range(count):
        assert (np.frombuffer(session.receive_gradient(), np.float32) == 8 * n).all()
    session.close()
    until(swarm.quiet)


def test_a_micro_batch_that_is_not_kept_is_said_so(swarm: Swarm) -> None:
    session = swarm.open_training("a", "b", "c")
    session.send_gradient(ZEROS, 13)
    with pytest.raises(PeerFailed, match="not kept here") as failed:
        session.receive_gradient()
    assert failed.value.peer == swarm.hosts["c"].peer
    assert isinstance(failed.value.__cause__, NotFound)
    until(swarm.quiet)


def test_a_state_that_is_none_ends_the_session(swarm: Swarm) -> None:
    session = swarm.open("a", "b")
    session.send_state(b"")
    with pytest.raises(Rejected, match="no state"):
        session.step(ZEROS, 0, 1)
    until(swarm.quiet)


def test_a_client_that_takes_no_gradients_is_not_read_from(swarm: Swarm) -> None:
    stream, sink = raw_session(swarm, swarm.client, "a", training=True)
    sink.setblocking(False)
    chunk = memoryview(frames.pack(Kind.GRADIENT, body_length=1 << 20) + bytes(1 << 20))
    total, moved = 0, time.monotonic()
    while time.monotonic() < moved + 1.0:
        with contextlib.suppress(BlockingIOError):
            total += sink.send(chunk[total % len(chunk) :])
            moved = time.monotonic()
    assert OUTBOX_BYTES < total < OUTBOX_BYTES + (32 << 20)
    stream.close()
    sink.close()
    until(swarm.quiet)


def test_sessions_that_are_ready_together_are_one_batch(swarm: Swarm) -> None:
    runner = swarm.runners["a"]
    first, *others = [swarm.open("a") for _ in range(3)]

    def together() -> bool:
        runner.gate.clear()
        runner.entered.clear()
        runner.batches.clear()
        first.send(ZEROS, 0, 1, b"gate")
        assert runner.entered.wait(PATIENCE)
        for session in others:
            session.send(ZEROS, 0, 1)
        for _ in range(3):
            swarm.chain.ping(swarm.hosts["a"].peer)
        runner.gate.set()
        for session in (first, *others):
            session.receive()
        return runner.batches == [1, 2]

    until(together)
    for session in (first, *others):
        session.close()


def test_two_clients_at_once_get_their_own_numbers(swarm: Swarm) -> None:
    wrong: list[int] = []

    def use(start: int) -> None:
        session = swarm.open("a", "b", "c")
        for position in range(40):
            _, body = session.step(np.full(16, start + position, np.float32).data, position, 1)
            if not (np.frombuffer(body, np.float32) == start + position + 7).all():
                wrong.append(position)
        session.close()

    threads = [threading.Thread(target=use, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_a_peer_can_be_a_stage_of_its_own_route(swarm: Swarm) -> None:
    server = ChainServer(swarm.client, Adder(16.0))
    server.start()
    session = swarm.open("client", "a", "client", "client")
    assert add_up(session) == 49.0
    session.close()
    server.stop()


def test_a_stage_that_refuses_is_heard(swarm: Swarm) -> None:
    with pytest.raises(PeerFailed, match=r"no room for 7 tokens\. Ask for less") as refused:
        swarm.open("a", "b", "c", codec="full")
    assert refused.value.peer == swarm.hosts["b"].peer
    assert isinstance(refused.value.__cause__, Busy)
    with pytest.raises(Rejected, match="no codec"):
        swarm.open("a", codec="unknown")
    with pytest.raises(PeerFailed, match="failed to open"):
        swarm.open("a", codec="defect")
    until(swarm.quiet)


def test_a_peer_that_cannot_be_reached_is_named(swarm: Swarm) -> None:
    nobody = Key.generate().peer
    for hops in ((nobody,), (swarm.hosts["a"].peer, nobody)):
        with pytest.raises(PeerFailed) as failed:
            swarm.chain.open(route(*hops), new_request())
        assert failed.value.peer == nobody
    with pytest.raises(PeerFailed) as failed:
        swarm.open("a", "spare")
    assert failed.value.peer == swarm.spare.peer
    until(swarm.quiet)


def test_an_error_of_one_step_ends_that_session_alone(swarm: Swarm) -> None:
    other = swarm.open("a", "b")
    for meta, kind, sentence in (
        (b"refuse", Rejected, "no hidden states"),
        (b"defect", PeerFailed, "failed to compute"),
        (b"explode", PeerFailed, "failed to compute"),
    ):
        session = swarm.open("a", "b")
        with pytest.raises(kind, match=sentence):
            session.step(ZEROS, 0, 1, meta)
        with pytest.raises(kind, match=sentence):
            session.step(ZEROS, 0, 1)
    assert add_up(other) == 3.0
    other.close()
    until(swarm.quiet)


def test_a_stage_whose_output_the_next_one_refuses_is_to_blame(swarm: Swarm) -> None:
    session = swarm.open("a", "b", "c")
    with pytest.raises(PeerFailed, match="are not finite") as failed:
        session.step(ZEROS, 0, 1, b"finite")
    assert failed.value.peer == swarm.hosts["a"].peer
    session = swarm.open_training("a", "b", "c")
    add_up(session)
    session.send_gradient(ZEROS, 14)
    with pytest.raises(PeerFailed, match="are not finite") as failed:
        session.receive_gradient()
    assert failed.value.peer == swarm.hosts["b"].peer
    session = swarm.open_training("a")
    add_up(session)
    session.send_gradient(ZEROS, 14)  # of which nobody else can be the cause
    with pytest.raises(Rejected):
        session.receive_gradient()
    until(swarm.quiet)


def test_a_session_that_nobody_wants_any_more_is_not_opened(swarm: Swarm) -> None:
    silent = Listener(swarm.spare, CHAIN)
    try:
        began = time.monotonic()
        with pytest.raises(PeerFailed, match="is closed"):
            swarm.chain.open(swarm.route("spare"), new_request(), stopped=lambda: True)
        assert time.monotonic() - began < NOTICED_SECONDS
    finally:
        silent.close()


def test_a_last_stage_that_opens_silent_streams_delays_no_other(swarm: Swarm) -> None:
    runner = swarm.runners["b"]
    with contextlib.ExitStack() as stack:
        silent = Listener(swarm.spare, CHAIN)
        stack.callback(silent.close)
        waiting = threading.Thread(target=open_in_vain, args=(swarm, "spare"))
        waiting.start()
        until(lambda: any(awaited.last == swarm.spare.peer for awaited in swarm.chain._awaited.values()))
        for _ in range(4):
            stack.enter_context(open_stream(swarm.spare, swarm.client.peer, SINK))
        until(lambda: swarm.chain._arrived.get(swarm.spare.peer))
        began = time.monotonic()
        swarm.open("b").close()
        assert time.monotonic() - began < SINK_SECONDS
        stack.enter_context(silent.accept()[0]).close()
        waiting.join()
    until(swarm.quiet)
    assert runner.opened


def open_in_vain(swarm: Swarm, *names: str) -> None:
    with pytest.raises(PeerFailed):
        swarm.open(*names)


@pytest.mark.parametrize("part", ["step", "watch", "open", "stop"])
def test_a_process_that_is_out_of_descriptors_says_so(swarm: Swarm, part: str) -> None:
    runner, session, listener = swarm.runners["a"], swarm.open("a"), Listener(swarm.spare, CHAIN)
    runner.gate.clear()
    runner.entered.clear()
    session.send(ZEROS, 0, 1, b"gate")
    assert runner.entered.wait(PATIENCE)
    with ThreadPoolExecutor(1) as waiting:
        answer = waiting.submit(session.receive)
        if part == "watch":
            until(lambda: session._watch)
        began, computing = time.monotonic(), time.process_time()
        with no_descriptors():
            if part == "open":
                with pytest.raises(Busy, match="Too many open files"):
                    swarm.open("b")
            elif part == "stop":
                listener.close()
            else:
                assert isinstance(answer.exception(PATIENCE), Busy)
        took = time.monotonic() - began
        assert took < NOTICED_SECONDS
        assert time.process_time() - computing < 0.5 + took / 2, "nobody spins"
        runner.gate.set()
    listener.close()
    session.close()
    until(swarm.quiet)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Every number below the limit is taken, also those that others give back meanwhile: nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    over = threading.Event()

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))

    def go_on() -> None:
        while not over.wait(0.002):
            take()

    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taking = threading.Thread(target=go_on)
    try:
        take()
        taking.start()
        yield
    finally:
        over.set()
        taking.join()
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_tokens_than_asked_for_are_refused(swarm: Swarm) -> None:
    session = swarm.open("a", max_tokens=10)
    assert add_up(session, position=9) == 1.0
    with pytest.raises(Rejected, match="room for 10 tokens"):
        session.step(ZEROS, 9, 2)


def test_seats_idleness_and_leaving(swarm: Swarm) -> None:
    runner = Adder(1.0)
    server = ChainServer(swarm.spare, runner, max_sessions=1, idle_seconds=0.6)
    server.start()
    session = swarm.open("spare", "a")
    with pytest.raises(PeerFailed, match="as many sessions") as refused:
        swarm.open("a", "spare")
    assert isinstance(refused.value.__cause__, Busy)
    until(lambda: server.sessions == 0)
    with pytest.raises(PeerFailed, match="idle") as failed:
        session.receive()
    assert failed.value.peer == swarm.spare.peer
    session = swarm.open("a", "spare", "b")
    server.stop()
    with pytest.raises(PeerFailed, match="leaves") as failed:
        session.step(ZEROS, 0, 1)
    assert failed.value.peer == swarm.spare.peer
    assert len(runner.opened) == len(runner.closed) == 2
    until(swarm.quiet)


def test_a_client_that_vanishes_frees_the_caches(swarm: Swarm) -> None:
    stream, sink = raw_session(swarm, swarm.client, "a", "b")
    assert swarm.servers["b"].sessions == 1
    stream.close()
    until(swarm.quiet)
    sink.close()


def test_malformed_frames_end_one_session(swarm: Swarm) -> None:
    other = swarm.open("a", "b")
    for garbage in (
        b"\xff" * 16,
        frames.HEADER.pack(Kind.DATA, 0, 0, frames.MAX_BODY_BYTES + 1, 0, 1),
        frames.HEADER.pack(Kind.CLOSE, 0, 0, 10, 0, 0),
        frames.pack(Kind.PING),
        frames.pack(Kind.GRADIENT),
    ):
        stream, sink = raw_session(swarm, swarm.client, "a", "b")
        stream.sendall(garbage)
        for end in (stream, sink):
            assert receive_frame(end, PATIENCE).kind is Kind.ERROR
            end.close()
    for training, garbage in ((False, frames.pack(Kind.GRADIENT)), (True, frames.pack(Kind.DATA, tokens=1))):
        stream, sink = raw_session(swarm, swarm.client, "a", "b", training=training)
        sink.sendall(garbage)  # from behind
        for end in (stream, sink):
            assert receive_frame(end, PATIENCE).kind is Kind.ERROR
            end.close()
    hops = tuple(Hop(swarm.hosts["a"].peer, Span(n, n + 1)) for n in range(1, 300))
    for first in (
        b"\xff" * 16,
        frames.pack(Kind.OPEN, b"\xc1"),
        frames.pack(Kind.CLOSE),
        frames.pack(Kind.OPEN, canonical.encode({"hops": hops})),
    ):
        stream = open_stream(swarm.client, swarm.hosts["a"].peer, CHAIN)
        stream.sendall(first)
        frame = receive_frame(stream, PATIENCE)
        assert Failure.read(frame.meta).error == "Rejected"
        stream.close()
    assert add_up(other) == 3.0
    other.close()
    until(swarm.quiet)


def test_a_slow_reader_is_not_read_from_and_stalls_nobody(swarm: Swarm) -> None:
    stream, sink = raw_session(swarm, swarm.client, "a")
    stream.setblocking(False)
    chunk = memoryview(frames.pack(Kind.DATA, body_length=1 << 20, tokens=1) + bytes(1 << 20))
    total, moved = 0, time.monotonic()
    while time.monotonic() < moved + 1.0:
        try:
            total += stream.send(chunk[total % len(chunk) :])
            moved = time.monotonic()
        except BlockingIOError:
            other = swarm.open("a")
            assert add_up(other) == 1.0
            other.close()
    assert OUTBOX_BYTES < total < OUTBOX_BYTES + (32 << 20)  # what the daemons buffer comes on top

    reader, scratch = FrameReader(), memoryview(bytearray(SCRATCH_BYTES))
    arrived: list[Frame] = []
    sink.settimeout(PATIENCE)
    while len(arrived) < total // len(chunk):
        arrived += reader.read(sink, scratch)
    assert all((np.frombuffer(frame.body, np.float32) == 1.0).all() for frame in arrived)
    stream.close()
    sink.close()
    until(swarm.quiet)


def test_a_sink_takes_no_stream_that_nobody_waits_for(swarm: Swarm) -> None:
    request = SessionRequest("0" * 32, MODEL, MODEL, "fp32", Span(0, 1), 10)
    stream = open_stream(swarm.hosts["a"], swarm.client.peer, SINK)
    with contextlib.suppress(BrokenPipeError):
        stream.sendall(Opening(request, (), swarm.client.peer).frame())
    with pytest.raises((EOFError, ConnectionError)):
        receive_frame(stream, PATIENCE)
    stream.close()


def test_a_session_closed_by_another_thread(swarm: Swarm) -> None:
    runner, session = swarm.runners["a"], swarm.open("a")
    runner.gate.clear()
    runner.entered.clear()
    errors: list[P2PModelError] = []

    def wait() -> None:
        try:
            session.step(ZEROS, 0, 1, b"gate")
        except P2PModelError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert runner.entered.wait(PATIENCE)
    session.close()
    thread.join(PATIENCE)
    runner.gate.set()
    assert "closed" in str(errors[0])
    until(swarm.quiet)


def test_pings_go_on_while_a_stage_computes_and_find_the_busy_one(swarm: Swarm) -> None:
    runner, session = swarm.runners["b"], swarm.open("a", "b", "c")
    runner.gate.clear()
    with pytest.raises(PeerFailed, match="busy with one step") as failed:
        session.step(ZEROS, 0, 1, b"gate", timeout=0.5)
    assert failed.value.peer == swarm.hosts["b"].peer
    assert 0 < swarm.chain.ping(swarm.hosts["b"].peer) < 1
    runner.gate.set()
    with pytest.raises(PeerFailed):
        swarm.chain.ping(swarm.spare.peer)
    until(swarm.quiet)


def test_one_peer_s_silent_streams_keep_nobody_from_being_answered(swarm: Swarm) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_PINGERS):
            stack.enter_context(open_stream(swarm.spare, swarm.hosts["b"].peer, PING))
        for _ in range(3):
            assert swarm.chain.ping(swarm.hosts["b"].peer) < 1


def test_a_protocol_has_one_listener(swarm: Swarm) -> None:
    listener = Listener(swarm.spare, PING)
    with pytest.raises(P2PModelError):
        Listener(swarm.spare, PING)
    listener.close()
    Listener(swarm.spare, PING).close()


@pytest.mark.parametrize(("whole_group", "names"), [(False, ("a", "y")), (True, ("y", "a"))])
def test_a_stage_that_stands_still_is_noticed_in_seconds(
    swarm: Swarm, processes: dict[str, Any], whole_group: bool, names: tuple[str, ...]
) -> None:
    """Alone, its daemon goes on taking streams; with its daemon, nothing there answers."""
    session = swarm.open("a", "y", "b")
    assert add_up(session) == 11.0
    tell = os.killpg if whole_group else os.kill
    tell(processes["y"].pid, signal.SIGSTOP)
    until(lambda: stands_still(processes["y"].pid))
    began = time.monotonic()
    with pytest.raises(PeerFailed, match="does not answer") as failed:
        session.step(ZEROS, 1, 1)
    assert failed.value.peer == swarm.hosts["y"].peer
    assert time.monotonic() - began < NOTICED_SECONDS
    began = time.monotonic()
    with pytest.raises(PeerFailed) as failed:
        swarm.open(*names)
    assert failed.value.peer == swarm.hosts["y"].peer
    assert time.monotonic() - began < NOTICED_SECONDS
    tell(processes["y"].pid, signal.SIGCONT)
    until(swarm.quiet)


def test_a_step_that_is_lost_is_noticed_in_seconds(swarm: Swarm) -> None:
    """The stage takes the step and answers it, but its session's answer never leaves."""
    session = swarm.open("a", "b")
    assert add_up(session) == 3.0
    (held,) = swarm.servers["b"]._by_name[session.name]
    held.outbox = Swallowing()
    began = time.monotonic()
    with pytest.raises(PeerFailed, match="lost its answer") as failed:
        session.step(ZEROS, 1, 1)
    assert failed.value.peer == swarm.hosts["b"].peer
    assert time.monotonic() - began < 2 * NOTICED_SECONDS
    until(swarm.quiet)


def test_a_gradient_that_is_lost_is_noticed_in_seconds(swarm: Swarm) -> None:
    session = swarm.open_training("a", "b", "c")
    assert add_up(session) == 7.0
    (held,) = swarm.servers["b"]._by_name[session.name]
    held.backbox = Swallowing()
    session.send_gradient(ZEROS, 0)
    with pytest.raises(PeerFailed, match="has not received") as failed:
        session.receive_gradient()
    assert failed.value.peer == swarm.hosts["a"].peer  # by all that anybody can see
    until(swarm.quiet)


def test_a_long_step_is_waited_for(swarm: Swarm) -> None:
    runner, session = swarm.runners["b"], swarm.open("a", "b", "c")
    runner.gate.clear()
    runner.entered.clear()
    session.send(ZEROS, 0, 1, b"gate")
    assert runner.entered.wait(PATIENCE)
    threading.Timer(NOTICED_SECONDS, runner.gate.set).start()
    meta, _ = session.receive()
    assert meta == b"gate"
    assert add_up(session, position=1) == 7.0
    session.close()
    until(swarm.quiet)


@pytest.mark.parametrize(("victim", "names"), [("x", ("a", "x", "b")), ("y", ("a", "b", "y"))])
def test_a_stage_that_is_killed_is_named_at_once(
    swarm: Swarm, processes: dict[str, Any], victim: str, names: tuple[str, ...]
) -> None:
    session = swarm.open(*names)
    assert add_up(session) == 11.0
    os.killpg(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PeerFailed) as failed:
        session.receive()
    assert failed.value.peer == swarm.hosts[victim].peer
    assert time.monotonic() - began < 2
    until(swarm.quiet)


class Swallowing(Outbox):
    """Takes everything, and sends nothing."""

    def put(self, frame: bytes) -> None:
        pass

    def put_data(self, body: Buffer, position: int, tokens: int, meta: bytes, kind: Kind = Kind.DATA) -> None:
        pass


def route(*peers: PeerId) -> Route:
    return Route(tuple(Hop(peer, Span(n, n + 1)) for n, peer in enumerate(peers)))


def new_request(codec: str = "fp32", max_tokens: int = 1 << 16, training: bool = False) -> SessionRequest:
    """To the first stage of such a route."""
    return SessionRequest(os.urandom(16).hex(), MODEL, MODEL, codec, Span(0, 1), max_tokens, training=training)


def add_up(session: ChainSession, position: int = 0) -> float:
    """What the stages of the session add to a zero."""
    _, body = session.step(ZEROS, position, 1)
    return float(np.frombuffer(body, np.float32)[0])


def raw_session(swarm: Swarm, opener: Host, *names: str, training: bool = False) -> tuple[Any, Any]:
    """A session's two ends as sockets; the sink is the spare peer's, and this is its only session."""
    hops = swarm.route(*names).hops
    request = new_request(training=training)
    listener = Listener(swarm.spare, SINK)
    stream = open_stream(opener, hops[0].peer, CHAIN)
    stream.sendall(Opening(request, hops[1:], swarm.spare.peer).frame())
    sink, peer = listener.accept()
    assert peer == hops[-1].peer
    assert receive_frame(sink, PATIENCE).kind is Kind.OPEN
    listener.close()
    until(lambda: all(swarm.servers[name].sessions for name in names))
    return stream, sink


def stands_still(pid: int) -> bool:
    """One thread takes the signal, and stops the others when it is scheduled."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for task in tasks)


async def serve() -> None:
    host = await Host.start()
    server = ChainServer(host, Adder(8.0))
    server.start()
    print(json.dumps({"peer": host.peer, "addresses": host.addresses}), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve())
