"""Serves a span of layers in chains: hidden states come from the hop before, go through the runner, and on to the next.

One thread, the compute thread, owns the sockets of all sessions. It takes every frame that is ready as one batch, runs
it, and sends without blocking; so a token passes no event loop, no queue and no other thread. What waits for somebody
(handshakes, dials, pings) has threads of its own.

A session ends for one reason, and both neighbours are told: an ERROR frame, or a CLOSE, goes to each side from which
the end did not come, and that side's socket is kept until the other end has read it and closed.
"""

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import Buffer, Noted, StageRunner
from p2pmodel.logic.gathering import Gathering
from p2pmodel.swarm import blame
from p2pmodel.swarm.admission import Admission, Admitted, Outcomes
from p2pmodel.swarm.framing import Frame, FrameReader
from p2pmodel.swarm.opening import Failure, lost
from p2pmodel.swarm.ping import PingResponder, State
from p2pmodel.swarm.reactor import Reactor
from p2pmodel.swarm.stage_session import ChainStats as ChainStats
from p2pmodel.swarm.stage_session import Counts, StageSession
from p2pmodel.swarm.streams import Host
from p2pmodel.wire import frames
from p2pmodel.wire.frames import Kind

SHORT_TOKENS = 16
"""Of a step that is no prompt: a token, or those that a draft has guessed."""

log = logging.getLogger(__name__)


class ChainServer(Reactor[StageSession]):
    """`start` and `stop` once each; every method may be called from any thread."""

    def __init__(
        self, host: Host, runner: StageRunner, *, max_sessions: int = 256, idle_seconds: float = 120.0
    ) -> None:
        super().__init__(PeerId(host.peer), "chain-compute")
        self._runner, self._idle_seconds = runner, idle_seconds
        self._seats = threading.Semaphore(max_sessions)
        self._admission = Admission(
            host,
            runner,
            self._seats,
            Outcomes(
                admitted=lambda admitted: self._call(partial(self._join, admitted)),
                refused=lambda stream, error: self._call(partial(self._refuse, stream, error)),
                abandoned=lambda handle: self._call(partial(self._release, handle)),
            ),
        )
        self._pings = PingResponder(host, self._state)
        self._by_name: dict[str, tuple[StageSession, ...]] = {}
        self._counts = Counts()
        self._gathering = Gathering()
        self._blind_since = 0.0
        self._step_began: float | None = None

    def start(self) -> None:
        """Raises Unreachable when the daemon is gone, or another server of this peer has the protocol."""
        self._thread.start()
        try:
            self._admission.start()
            self._pings.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Every session's neighbours hear that this peer leaves. Blocks for seconds at most; not for the event loop."""
        with contextlib.ExitStack() as stack:  # each of them, whatever the others raise
            stack.callback(self._finish)
            stack.callback(self._pings.stop)
            stack.callback(self._admission.stop)

    @property
    def sessions(self) -> int:
        return len(self._members)

    def stats(self) -> ChainStats:
        return ChainStats(sessions=len(self._members), **vars(self._counts))

    def _state(self, name: str) -> State:
        """For the ping thread, which may find things a moment old."""
        began, now = self._step_began, time.monotonic()
        progress = tuple(session.progress(now) for session in self._by_name.get(name, ()))
        return State(0.0 if began is None else now - began, len(self._members), progress)

    # ---- all below runs in the compute thread

    def _join(self, admitted: Admitted) -> None:
        session = StageSession(admitted, time.monotonic())
        self._watch(session)
        self._members[session] = None
        same = (*self._by_name.get(session.name, ()), session)  # a peer can be several hops of a route
        self._by_name[session.name] = tuple(sorted(same, key=lambda one: one.start))
        self._counts.opened += 1

    def _watch(self, session: StageSession) -> None:
        for stream, happened in ((session.before, self._from_before), (session.after, self._from_after)):
            watching, wanted = session.watching[stream], session.events(stream)
            if wanted == watching:
                continue
            session.watching[stream] = wanted
            self._listen(stream, watching, wanted, partial(happened, session))

    def _from_before(self, session: StageSession, events: int) -> None:
        if not session.open:
            return
        if events & selectors.EVENT_WRITE:
            self._flush(session)
        if not events & selectors.EVENT_READ:
            return
        try:
            arrived = self._read(session, session.before, session.incoming)
        except (OSError, EOFError):
            self._end(session, lost(session.before_peer), source=session.before)
            return
        except Rejected:
            self._end(session, blame.malformed(session))
            return
        if arrived:
            if not session.training:
                self._gathering.arrived(session, self._blind_since or session.active, session.active)
            session.forwards.taken += len(arrived)
            session.read = session.active
            session.frames.extend(arrived)
            self._ready[session] = None
            if session.training:  # others may come first: what is behind this one stays where it is
                self._watch(session)

    def _from_after(self, session: StageSession, events: int) -> None:
        """The next hop takes what waits for it, sends gradients back, and says why it gives up."""
        if not session.open:
            return
        if events & selectors.EVENT_WRITE:
            self._flush(session)
        if not events & selectors.EVENT_READ:
            return
        try:
            arrived = self._read(session, session.after, session.returning)
        except (OSError, EOFError):
            self._end(session, lost(session.after_peer), source=session.after)
            return
        except Rejected:
            self._end(session, PeerFailed("It sent a malformed frame.", session.after_peer))
            return
        for frame in arrived:
            if frame.kind is Kind.ERROR:
                self._end(session, blame.told(frame, session.after_peer, self._peer), source=session.after)
                return
            if frame.kind is not Kind.GRADIENT or not session.training:
                self._end(session, PeerFailed("It sent a frame that has no place there.", session.after_peer))
                return
            session.backwards.taken += 1
            session.read = session.active
            session.gradients.append(frame)
            self._ready[session] = None
        self._watch(session)

    def _read(self, session: StageSession, stream: socket.socket, reader: FrameReader) -> list[Frame]:
        received = reader.received
        try:
            arrived = reader.read(stream, self._scratch)
        except BlockingIOError:
            return []
        self._counts.bytes_in += reader.received - received
        session.active = time.monotonic()
        return arrived

    def _compute(self, now: float) -> None:
        self._blind_since = 0.0
        if self._ready:
            self._patience = self._gathering.patience(now)
            if not self._patience:
                self._take_up()

    def _take_up(self) -> None:
        """Everything short that is ready as one batch, and one prompt or micro-batch, so that answers under way are not
        kept waiting by those that begin."""
        self._blind_since = time.monotonic()
        batch: list[tuple[StageSession, Frame]] = []
        long: tuple[StageSession, Frame] | None = None
        for session in list(self._ready):
            frame = session.next_frame
            assert frame is not None
            is_long = frame.tokens > SHORT_TOKENS or session.training
            if is_long and long is not None:
                continue
            del self._ready[session]
            is_gradient = bool(session.gradients)
            session.take_frame()
            if frame.kind in (Kind.DATA, Kind.GRADIENT):
                self._counts.queued.add(self._blind_since - session.read)
            if session.next_frame is not None:
                self._ready[session] = None  # behind the others
            if is_gradient:
                long = session, frame
            elif frame.kind is Kind.CLOSE:
                self._end(session, None, source=session.before)
            elif frame.kind is Kind.ERROR:
                self._end(session, blame.told(frame, session.before_peer, self._peer), source=session.before)
            elif frame.kind is Kind.STATE:
                self._load(session, frame)
            elif frame.kind is not Kind.DATA:
                self._end(session, blame.malformed(session))
            elif not 1 <= frame.tokens <= session.max_tokens - (0 if session.training else frame.position):
                full = Rejected("frame", f"The session has room for {session.max_tokens} tokens.")
                self._end(session, blame.judged(full, session, session.before_peer, self._peer))
            elif is_long:
                long = session, frame
            else:
                batch.append((session, frame))
        if batch:
            self._answer(batch)
        if long and long[1].kind is Kind.GRADIENT:
            self._answer_back(*long)
        elif long:
            self._answer([long])

    def _load(self, session: StageSession, frame: Frame) -> None:
        try:
            self._runner.load(session.handle, frame.body)
            if not session.is_last:
                session.outbox.put_data(frame.body, frame.position, frame.tokens, frame.meta, Kind.STATE)
        except Exception as error:
            self._end(session, blame.explained(error, self._peer))
            return
        session.forwards.given += 1
        self._flush(session)

    def _answer_back(self, session: StageSession, frame: Frame) -> None:
        began = self._step_began = time.monotonic()
        try:
            output = self._runner.backward(session.handle, frame.position, frame.body)
            session.backbox.put_data(output, frame.position, frame.tokens, frame.meta, Kind.GRADIENT)
        except Exception as error:
            self._end(session, blame.judged(error, session, session.after_peer, self._peer))
            return
        finally:
            self._step_began = None
            seconds = time.monotonic() - began
            self._counts.step_seconds += seconds
            self._counts.phases["backward"].add(seconds)
        self._counts.gradients += 1
        session.backwards.given += 1
        self._flush(session)

    def _answer(self, batch: Sequence[tuple[StageSession, Frame]]) -> None:
        began = time.monotonic()
        outputs = self._step([(session.handle, frame.position, frame.meta, frame.body) for session, frame in batch])
        now = time.monotonic()
        if all(frame.tokens == 1 for _, frame in batch):
            self._gathering.computed(now - began)
        short = all(frame.tokens <= SHORT_TOKENS for _, frame in batch)
        phase = "training" if batch[0][0].training else "decode" if short else "prefill"
        self._counts.phases[phase].add(now - began)
        self._counts.together.add(len(batch))
        for (session, frame), output in zip(batch, outputs, strict=True):
            if isinstance(output, Exception):
                self._end(session, blame.judged(output, session, session.before_peer, self._peer))
                continue
            self._counts.frames += 1
            self._counts.tokens += frame.tokens
            session.forwards.given += 1
            if not session.frames and not session.training:
                self._gathering.answered(session, now)
            body, meta = output if isinstance(output, Noted) else (output, frame.meta)
            try:
                session.outbox.put_data(body, frame.position, frame.tokens, meta)
            except (Rejected, TypeError) as error:
                self._end(session, blame.explained(error, self._peer))
            else:
                self._flush(session)

    def _step(self, batch: Sequence[tuple[Any, int, bytes, Buffer]]) -> Sequence[Buffer | Noted | Exception]:
        began = self._step_began = time.monotonic()
        try:
            outputs = self._runner.step(batch)
            if len(outputs) != len(batch):
                raise ValueError(f"the runner gave {len(outputs)} outputs for {len(batch)} items")
        except Exception as error:
            log.exception("a step of %d sessions failed", len(batch))
            outputs = [error] * len(batch)
        self._step_began = None
        self._counts.batches += 1
        self._counts.step_seconds += time.monotonic() - began
        return outputs

    def _flush(self, session: StageSession) -> None:
        for outbox, stream in ((session.outbox, session.after), (session.backbox, session.before)):
            if outbox.size:
                sent = outbox.sent
                outbox.flush(stream)
                if outbox.sent > sent:
                    self._counts.bytes_out += outbox.sent - sent
                    session.active = time.monotonic()
        self._watch(session)

    # ---- ends

    def _end(
        self, session: StageSession, why: P2PModelError | Failure | None, source: socket.socket | None = None
    ) -> None:
        """`why` is None when the client said CLOSE. `source` is the side that the end came from: it needs no word."""
        if not session.open:
            return
        session.open = False
        self._gathering.ended(session)
        del self._members[session]
        self._forget_name(session)
        self._ready.pop(session, None)
        failure = Failure.of(why, self._peer) if isinstance(why, P2PModelError) else why
        last = frames.pack(Kind.CLOSE) if failure is None else failure.frame()
        if failure is not None:
            self._counts.failed += 1
            log.info("a session ended: %r: %r", failure.error, failure.message)
        session.outbox.put(last)
        session.backbox.put(last)
        ends = ((session.before, session.backbox, False), (session.after, session.outbox, True))
        try:
            for stream, outbox, quiet in ends:
                if session.watching[stream]:
                    self._selector.unregister(stream)
                if stream is source:
                    stream.close()
                else:
                    self._lingering.add(stream, outbox, quiet=quiet)
        finally:
            self._release(session.handle)

    def _forget_name(self, session: StageSession) -> None:
        others = tuple(other for other in self._by_name[session.name] if other is not session)
        if others:
            self._by_name[session.name] = others
        else:
            del self._by_name[session.name]

    def _end_all(self, why: P2PModelError) -> None:
        for session in list(self._members):
            try:
                self._end(session, why)
            except Exception:
                log.exception("a session could not be ended in order")
                for stream in (session.before, session.after):
                    with contextlib.suppress(KeyError, ValueError):
                        self._selector.unregister(stream)
                    stream.close()

    def _release(self, handle: Any) -> None:
        try:
            self._runner.close(handle)
        except Exception:
            log.exception("the runner failed to close a session")
        finally:
            self._seats.release()

    def _refuse(self, stream: socket.socket, error: P2PModelError) -> None:
        self._counts.failed += 1
        log.info("a session was refused: %r", error.message)
        self._turn_away(stream, error)

    def _sweep(self, now: float) -> None:
        for session in [s for s in self._members if s.active + self._idle_seconds < now]:
            self._end(session, PeerFailed(f"It closed a session idle for {self._idle_seconds:g} s.", self._peer))
