"""The client's sessions and tapes over real sockets, whose other ends do as a test says."""

import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pmodel.domain.errors import NotRunning, P2PModelError, PeerFailed, Rejected, Unreachable
from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.domain.swarm import Hop, Route, Span
from p2pmodel.engine.steps import Microbatch, Note
from p2pmodel.node.asking import inference, tape
from p2pmodel.node.asking.connecting import Connector, Stopped
from p2pmodel.node.asking.inference import RoutedChain
from p2pmodel.node.asking.tape import SAME_FAILURES
from p2pmodel.swarm.chain_session import ChainSession
from p2pmodel.swarm.framing import SCRATCH_BYTES, Frame, FrameReader
from p2pmodel.swarm.opening import Failure
from p2pmodel.swarm.watch import Watch
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind
from p2pmodel.wire.signing import Key

MODEL = ModelId(canonical.digest(b"model"))
WIDTH = 4
Answer = Callable[[int, Frame], bytes | P2PModelError]


def echo(_: int, frame: Frame) -> bytes:
    return bytes(frame.body)


class Stage:
    """Stands for all peers, one after another: session number n is with `peers[n]`, and answered by `answer`."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.peers = [Key.generate().peer for _ in range(8)]
        self.sessions: list[ChainSession] = []
        self.suspected: list[PeerId] = []
        self._threads: list[threading.Thread] = []

    def find(self, banned: frozenset[PeerId], stopped: Stopped) -> Route:
        for peer in self.peers[len(self.sessions) :]:
            if peer not in banned:
                return Route((Hop(peer, Span(0, 2)),))
        raise Unreachable("Nobody serves layers 0:2.")

    def open(self, route: Route, *_: Any, **__: Any) -> ChainSession:
        (out, first), (sink, last) = socket.socketpair(), socket.socketpair()
        session = ChainSession("0" * 32, route, out, sink, never_silent, lambda _: PeerFailed("It takes too long."))
        thread = threading.Thread(target=self._serve, args=(len(self.sessions), route, first, last))
        self.sessions.append(session)
        self._threads.append(thread)
        thread.start()
        return session

    def chain(self) -> RoutedChain:
        connector = Connector(
            self,  # type: ignore[arg-type]
            self.find,
            self.suspected.append,
            MODEL,
            VersionId(MODEL),
            get_codec("fp32"),
            chunked=True,
            stack="model.layers",
        )
        return RoutedChain(connector)

    def end(self) -> None:
        for session in self.sessions:
            session.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _serve(self, number: int, route: Route, first: socket.socket, last: socket.socket) -> None:
        readers, scratch = {first: FrameReader(), last: FrameReader()}, memoryview(bytearray(SCRATCH_BYTES))
        with first, last:
            try:
                while True:
                    for stream in select.select([first, last], [], [])[0]:
                        for frame in readers[stream].read(stream, scratch):
                            self._tell(number, route, frame, last if stream is first else first)
            except (OSError, EOFError):
                return

    def _tell(self, number: int, route: Route, frame: Frame, to: socket.socket) -> None:
        if frame.kind not in (Kind.DATA, Kind.GRADIENT):
            raise EOFError
        said = self.answer(number, frame)
        if isinstance(said, P2PModelError):
            to.sendall(Failure.of(said, route.hops[0].peer).frame())
            raise EOFError
        to.sendall(frames.pack(frame.kind, b"", len(said), frame.position, frame.tokens) + said)


def never_silent(_: object) -> Watch:
    raise AssertionError("nobody was silent long enough to be watched")


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage(echo)
    yield stage
    stage.end()


def hidden(tokens: int, start: float) -> Tensor:
    return torch.arange(start, start + tokens * WIDTH).view(1, tokens, WIDTH)


def interrupt(_: int, frame: Frame) -> bytes:
    """Ctrl-C, while the answer is waited for."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(0.05)
    return echo(0, frame)


def test_a_step_that_is_broken_off_leaves_no_answer_to_the_next_one(stage: Stage) -> None:
    session = stage.chain().open(16, 1, rewinds=True)
    session.forward(hidden(3, 0.0), 0, Note(wanted=1))
    stage.answer = interrupt
    with pytest.raises(KeyboardInterrupt):
        session.forward(hidden(1, 100.0), 3, Note(wanted=1))
    stage.answer = lambda number, frame: bytes(frame.body)[-4 * WIDTH :]
    assert torch.equal(session.forward(hidden(1, 200.0), 3, Note(wanted=1)), hidden(1, 200.0))
    assert len(stage.sessions) == 2
    assert session.traffic[0] > stage.sessions[1].bytes_sent


def test_a_training_step_that_is_broken_off_leaves_no_answer_to_the_next_one(stage: Stage) -> None:
    tape = stage.chain().tape()
    tape.forward(hidden(2, 0.0), Microbatch(1, inputs=True), {})
    stage.answer = interrupt
    with pytest.raises(KeyboardInterrupt):
        tape.forward(hidden(2, 100.0), Microbatch(1, inputs=True), {})
    stage.answer = echo
    output, ticket = tape.forward(hidden(2, 200.0), Microbatch(1, inputs=True), {})
    assert torch.equal(output, hidden(2, 200.0))
    inputs, _ = tape.backward(ticket, hidden(2, 7.0))
    assert inputs is not None
    assert torch.equal(inputs, hidden(2, 7.0))


def test_after_a_refused_step_a_tape_can_be_used_again(stage: Stage) -> None:
    tape = stage.chain().tape()
    stage.answer = lambda _, __: Rejected("shape", "These are no hidden states of this model.")
    with pytest.raises(Rejected):
        tape.forward(hidden(2, 0.0), Microbatch(1, inputs=True), {})
    stage.answer = echo
    assert torch.equal(tape.forward(hidden(2, 1.0), Microbatch(1, inputs=True), {})[0], hidden(2, 1.0))


def test_a_training_step_that_fails_wherever_it_goes_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "FIRST_PAUSE_SECONDS", 0.001)
    stage.answer = lambda _, __: PeerFailed("A stage could not compute layers 0:2: out of memory.")
    with pytest.raises(PeerFailed, match="out of memory"):
        stage.chain().tape().forward(hidden(2, 0.0), Microbatch(1, inputs=True), {})
    assert len(stage.sessions) == tape.MOST_FAILURES
    only, stage.sessions = stage.peers[0], []
    monkeypatch.setattr(stage, "find", lambda banned, stopped: Route((Hop(only, Span(0, 2)),)))
    with pytest.raises(PeerFailed, match="out of memory"):
        stage.chain().tape().forward(hidden(2, 0.0), Microbatch(1, inputs=True), {})
    assert len(stage.sessions) == SAME_FAILURES


def test_a_last_stage_that_answers_what_is_not_finite_is_failed_over(stage: Stage) -> None:
    def broken_at_first(number: int, frame: Frame) -> bytes:
        body = torch.frombuffer(bytearray(frame.body), dtype=torch.float32)
        if number == 0:
            body[-1] = torch.nan
        return body.numpy().tobytes()

    stage.answer = broken_at_first
    session = stage.chain().open(16, 1, rewinds=True)
    assert torch.equal(session.forward(hidden(3, 0.0), 0, Note()), hidden(3, 0.0))
    assert session.failovers == 1
    assert stage.suspected == [stage.peers[0]]
    stage.sessions.clear()
    tape = stage.chain().tape()
    assert torch.equal(tape.forward(hidden(3, 0.0), Microbatch(1, inputs=True), {})[0], hidden(3, 0.0))
    assert tape.failovers == 1


def test_a_session_that_cannot_be_opened_and_nobody_is_to_blame_is_given_up(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "PATIENCE_SECONDS", 0.01)
    tries = []

    def fail(*_: Any, **__: Any) -> ChainSession:
        tries.append(1)
        raise PeerFailed("No answer came in time, though every peer of the route answers pings.")

    monkeypatch.setattr(stage, "open", fail)
    with pytest.raises(PeerFailed, match="No answer came"):
        stage.chain().open(16, 1, rewinds=True).forward(hidden(1, 0.0), 0, Note())
    assert len(tries) >= 2


@pytest.mark.parametrize("opened", [False, True], ids=["before", "after"])
def test_a_session_that_is_abandoned_while_it_is_opened_is_not_used(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    chain, opening = stage.chain(), stage.open
    session = chain.open(16, 1, rewinds=True)

    def open_and_abandon(*args: Any, **options: Any) -> ChainSession:
        found = opening(*args, **options) if opened else None
        session.abandon()
        if found is None:
            raise PeerFailed("It is gone.", stage.peers[0])
        return found

    monkeypatch.setattr(stage, "open", open_and_abandon)
    with pytest.raises((PeerFailed, NotRunning), match="is closed"):
        session.forward(hidden(1, 0.0), 0, Note())
    assert session.traffic[1] == 0


def test_what_an_abandoned_chain_opens_is_abandoned(stage: Stage) -> None:
    chain = stage.chain()
    chain.abandon()
    with pytest.raises(NotRunning):
        chain.open(16, 1, rewinds=True).forward(hidden(1, 0.0), 0, Note())
    assert not stage.sessions
