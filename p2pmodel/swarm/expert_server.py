"""Serves experts to trunks: rows come on a stream that stays open, and weighted sums go back in the same order.

One thread owns the streams and computes. Whatever calls are there when it looks are one batch, so several trunks' rows
for the same experts share a forward. A call that is wrong is answered with an ERROR frame, and its stream ends: the
trunk has others to ask.
"""

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from p2pmodel.domain.errors import Busy, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import ExpertRunner
from p2pmodel.swarm.expert_streams import EXPERTS, HANDSHAKE_SECONDS, read_opening
from p2pmodel.swarm.framing import SCRATCH_BYTES, Frame, FrameReader, Outbox, receive_frame
from p2pmodel.swarm.lingering import Lingering
from p2pmodel.swarm.opening import Failure
from p2pmodel.swarm.streams import Host, Listener
from p2pmodel.wire import frames
from p2pmodel.wire.frames import Kind

MAX_TRUNKS = 256
MAX_WAITING_TRUNKS = 64
"""Whose first frame is being read."""
MAX_WAITING_CALLS = 8
"""Of one trunk; what it sends beyond them stays where it is."""
SWEEP_SECONDS = 0.5
BUSY_SECONDS = 5.0
IDLE_SECONDS = 600.0
WORKERS = 4

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Trunk:
    """One stream. active: when a byte of it last moved."""

    stream: socket.socket
    peer: PeerId
    handle: Any
    active: float
    reader: FrameReader = field(default_factory=FrameReader)
    outbox: Outbox = field(default_factory=Outbox)
    calls: deque[Frame] = field(default_factory=deque)
    watching: int = 0
    open: bool = True
    asked: float = 0.0


@dataclass(frozen=True)
class ExpertStats:
    """trunks: connected now; busy: of these, those that asked lately; the others are totals since the start. calls:
    answered; batches: forwards that they took together; failed: streams that ended for an error."""

    trunks: int
    busy: int
    calls: int
    batches: int
    failed: int
    bytes_in: int
    bytes_out: int


class ExpertServer:
    """`start` and `stop` once each; every public method may be called from any thread."""

    def __init__(self, host: Host, runner: ExpertRunner) -> None:
        self._host, self._runner = host, runner
        self._peer = PeerId(host.peer)
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._lingering = Lingering(self._selector, self._scratch)
        self._waiting = threading.Semaphore(MAX_WAITING_TRUNKS)
        self._seats = threading.Semaphore(MAX_TRUNKS)
        self._trunks: set[_Trunk] = set()
        self._listener: Listener | None = None
        self._pool = ThreadPoolExecutor(WORKERS, "expert-admit")
        self._thread = threading.Thread(target=self._serve, name="expert-compute", daemon=True)
        self._leaving = False
        self._calls = self._batches = self._failed = self._bytes_in = self._bytes_out = 0
        self._next_sweep = 0.0

    def start(self) -> None:
        """Raises Unreachable when the daemon is gone, or another server of this peer has the protocol."""
        self._listener = Listener(self._host, EXPERTS)
        for end in (self._wake, self._waker):
            end.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, self._run_tasks)
        self._accepting = threading.Thread(
            target=self._accept, args=(self._listener,), name="expert-accept", daemon=True
        )
        self._thread.start()
        self._accepting.start()

    def stop(self) -> None:
        """Trunks hear that this peer leaves. Blocks for seconds at most; not for the event loop. A second
        call does nothing."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.close()
        self._accepting.join()
        self._pool.shutdown()
        self._call(self._leave)
        self._thread.join()

    @property
    def stats(self) -> ExpertStats:
        since = time.monotonic() - BUSY_SECONDS
        trunks = list(self._trunks)
        return ExpertStats(
            len(trunks),
            sum(trunk.asked >= since for trunk in trunks),
            self._calls,
            self._batches,
            self._failed,
            self._bytes_in,
            self._bytes_out,
        )

    def _call(self, what: Callable[[], None]) -> None:
        self._tasks.put(what)
        with contextlib.suppress(BlockingIOError):  # then it is being woken already
            self._waker.send(b"\0")

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                stream, peer = listener.accept()
            except EOFError:
                return
            if self._waiting.acquire(blocking=False):
                self._pool.submit(self._admit, stream, peer)
            else:
                stream.close()

    def _admit(self, stream: socket.socket, peer: PeerId) -> None:
        try:
            handle = self._handshake(stream)
        except P2PModelError as error:
            self._call(partial(self._refuse, stream, error))
        except (OSError, EOFError):
            stream.close()
        else:
            self._call(partial(self._join, _Trunk(stream, peer, handle, time.monotonic())))
        finally:
            self._waiting.release()

    def _handshake(self, stream: socket.socket) -> Any:
        opening = read_opening(receive_frame(stream, HANDSHAKE_SECONDS))
        if not self._seats.acquire(blocking=False):
            raise Busy("This peer serves as many trunks as it can.", "Try another peer.")
        try:
            handle = self._runner.open(opening)
            stream.settimeout(HANDSHAKE_SECONDS)
            stream.sendall(frames.pack(Kind.OPEN))
            stream.setblocking(False)
        except BaseException:
            self._seats.release()
            raise
        return handle

    # ---- all below runs in the compute thread

    def _serve(self) -> None:
        while not (self._leaving and not self._lingering):
            try:
                self._turn()
            except Exception:
                log.exception("the thread that computes experts failed; its streams end")
                for trunk in list(self._trunks):
                    self._end(trunk, PeerFailed("This peer failed.", self._peer))
        self._selector.close()
        self._wake.close()
        self._waker.close()

    def _turn(self) -> None:
        ready = any(trunk.calls for trunk in self._trunks)
        idle = None if not (self._trunks or self._lingering) else SWEEP_SECONDS
        for key, events in self._selector.select(0.0 if ready else idle):
            key.data(events)
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self._lingering.sweep(now)
            for trunk in [trunk for trunk in self._trunks if trunk.active + IDLE_SECONDS < now]:
                self._end(trunk, PeerFailed("It closed a stream that was idle.", self._peer))
        self._compute()

    def _run_tasks(self, _events: int) -> None:
        self._wake.recv(4096)
        while not self._tasks.empty():
            self._tasks.get()()

    def _join(self, trunk: _Trunk) -> None:
        if self._leaving:
            trunk.stream.close()
            return
        self._trunks.add(trunk)
        self._watch(trunk)

    def _watch(self, trunk: _Trunk) -> None:
        """Reads where there is room for another call, writes where something waits."""
        wanted = selectors.EVENT_READ if len(trunk.calls) < MAX_WAITING_CALLS else 0
        if trunk.outbox.size:
            wanted = (wanted if trunk.outbox.size < frames.MAX_BODY_BYTES else 0) | selectors.EVENT_WRITE
        if wanted == trunk.watching:
            return
        before, trunk.watching = trunk.watching, wanted
        happened = partial(self._happened, trunk)
        if not wanted:
            self._selector.unregister(trunk.stream)
        elif before:
            self._selector.modify(trunk.stream, wanted, happened)
        else:
            self._selector.register(trunk.stream, wanted, happened)

    def _happened(self, trunk: _Trunk, events: int) -> None:
        if not trunk.open:
            return
        if events & selectors.EVENT_WRITE:
            self._flush(trunk)
        if not events & selectors.EVENT_READ:
            return
        received = trunk.reader.received
        try:
            arrived = trunk.reader.read(trunk.stream, self._scratch)
        except BlockingIOError:
            return
        except (OSError, EOFError):
            self._end(trunk, None)
            return
        except Rejected as error:
            self._end(trunk, error)
            return
        trunk.active = time.monotonic()
        self._bytes_in += trunk.reader.received - received
        for frame in arrived:
            if frame.kind is Kind.CLOSE:
                self._end(trunk, None)
                return
            if frame.kind is not Kind.DATA:
                self._end(trunk, Rejected("frame", "A trunk sent a frame that has no place there."))
                return
            trunk.calls.append(frame)
        self._watch(trunk)

    def _compute(self) -> None:
        """The oldest call of every trunk that has any, as one batch."""
        batch = [(trunk, trunk.calls.popleft()) for trunk in list(self._trunks) if trunk.calls]
        if not batch:
            return
        try:
            answers = self._runner.compute([(trunk.handle, frame.meta, frame.body) for trunk, frame in batch])
        except Exception as error:
            log.exception("%d calls failed", len(batch))
            answers = [error] * len(batch)
        self._batches += 1
        now = time.monotonic()
        for (trunk, frame), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                failed = answer if isinstance(answer, P2PModelError) else PeerFailed("This peer failed.", self._peer)
                self._end(trunk, failed)
                continue
            self._calls += 1
            trunk.asked = now
            trunk.outbox.put_data(answer, frame.position, frame.tokens, b"")
            self._flush(trunk)

    def _flush(self, trunk: _Trunk) -> None:
        sent = trunk.outbox.sent
        trunk.outbox.flush(trunk.stream)
        self._bytes_out += trunk.outbox.sent - sent
        trunk.active = time.monotonic()
        self._watch(trunk)

    def _end(self, trunk: _Trunk, why: P2PModelError | None) -> None:
        """`why` is None where the trunk itself has closed."""
        if not trunk.open:
            return
        trunk.open = False
        self._trunks.discard(trunk)
        self._seats.release()
        if trunk.watching:
            self._selector.unregister(trunk.stream)
        if why is None:
            trunk.stream.close()
            return
        self._failed += 1
        log.info("the stream of trunk %s ended: %r", trunk.peer, why.message)
        trunk.outbox.put(Failure.of(why, self._peer).frame())
        self._lingering.add(trunk.stream, trunk.outbox, quiet=False)

    def _refuse(self, stream: socket.socket, error: P2PModelError) -> None:
        self._failed += 1
        log.info("a trunk was refused: %r", error.message)
        stream.setblocking(False)
        outbox = Outbox()
        outbox.put(Failure.of(error, self._peer).frame())
        self._lingering.add(stream, outbox, quiet=False)

    def _leave(self) -> None:
        self._leaving = True
        for trunk in list(self._trunks):
            self._end(trunk, PeerFailed("It leaves the swarm.", self._peer))
