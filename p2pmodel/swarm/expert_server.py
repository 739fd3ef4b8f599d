"""Serves experts to trunks: rows come on a stream that stays open, and weighted sums go back in the same order.

One thread owns the streams and computes. Whatever calls are there when it looks are one batch, so several trunks' rows
for the same experts share a forward. A call that is wrong is answered with an ERROR frame, and its stream ends: the
trunk has others to ask.
"""

import logging
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from p2pmodel.domain.errors import Busy, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import ExpertRunner
from p2pmodel.swarm.expert_admission import ExpertAdmission, Outcomes
from p2pmodel.swarm.expert_streams import IDLE_SECONDS
from p2pmodel.swarm.framing import Frame, FrameReader, Outbox
from p2pmodel.swarm.opening import Failure
from p2pmodel.swarm.reactor import Reactor
from p2pmodel.swarm.streams import Host
from p2pmodel.wire.frames import Kind

MAX_TRUNKS = 256
MAX_STREAMS_OF_PEER = 4
"""A further one takes the place of the oldest: a trunk has one, and another while it renews it."""
MAX_WAITING_CALLS = 8
"""Of one stream; what comes beyond them stays where it is."""
MAX_HELD_BYTES = 512 << 20
"""Of calls and answers that wait, or are on their way, in all streams. Beyond that the one with most of them ends."""
SHORT = 16
"""A call this many times smaller than the largest is short; of others, one at a time is computed."""
BUSY_SECONDS = 5.0
STUCK_SECONDS = 60.0
"""Without a byte of a call that has begun to come, or of an answer that waits to be read."""

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Trunk:
    """One stream. active: when a byte of it last moved; counted: what of it is in the server's sum of `held`."""

    stream: socket.socket
    peer: PeerId
    handle: Any
    active: float
    reader: FrameReader
    outbox: Outbox = field(default_factory=Outbox)
    calls: deque[Frame] = field(default_factory=deque)
    watching: int = 0
    open: bool = True
    asked: float = 0.0
    counted: int = 0

    @property
    def waiting(self) -> int:
        """Bytes of the calls that are to be computed."""
        return sum(len(call.body) for call in self.calls)

    @property
    def held(self) -> int:
        return self.reader.held + self.waiting + self.outbox.size

    def wants(self) -> int:
        """Reads where there is room for another call, writes where something waits."""
        most = self.reader.most
        reads = len(self.calls) < MAX_WAITING_CALLS and self.waiting < most and self.outbox.size < most
        return (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if self.outbox.size else 0)

    def is_over(self, now: float) -> bool:
        """Whether it is of no use any more."""
        halfway = self.outbox.size or (self.reader.held and self.watching & selectors.EVENT_READ)
        return self.active + (STUCK_SECONDS if halfway else IDLE_SECONDS) < now


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


class ExpertServer(Reactor[_Trunk]):
    """`start` and `stop` once each; every public method may be called from any thread."""

    def __init__(self, host: Host, runner: ExpertRunner) -> None:
        super().__init__(PeerId(host.peer), "expert-compute")
        self._runner = runner
        self._seats = threading.Semaphore(MAX_TRUNKS)
        self._admission = ExpertAdmission(
            host,
            runner,
            self._seats,
            Outcomes(
                admitted=lambda stream, peer, handle: self._call(partial(self._join, stream, peer, handle)),
                refused=lambda stream, error: self._call(partial(self._refuse, stream, error)),
            ),
        )
        self._held = 0
        self._answered = self._batches = self._failed = self._bytes_in = self._bytes_out = 0

    def start(self) -> None:
        """Raises Unreachable when the daemon is gone, or another server of this peer has the protocol."""
        self._admission.start()
        self._thread.start()

    def stop(self) -> None:
        """Trunks hear that this peer leaves. Blocks for seconds at most; not for the event loop. A second
        call does nothing."""
        self._admission.stop()
        self._finish()

    @property
    def stats(self) -> ExpertStats:
        since = time.monotonic() - BUSY_SECONDS
        trunks = list(self._members)
        return ExpertStats(
            len(trunks),
            sum(trunk.asked >= since for trunk in trunks),
            self._answered,
            self._batches,
            self._failed,
            self._bytes_in,
            self._bytes_out,
        )

    # ---- all below runs in the compute thread

    def _join(self, stream: socket.socket, peer: PeerId, handle: Any) -> None:
        if self._leaving:
            stream.close()
            self._seats.release()
            return
        earlier = [trunk for trunk in self._members if trunk.peer == peer]
        for trunk in earlier[: max(0, len(earlier) + 1 - MAX_STREAMS_OF_PEER)]:
            self._end(trunk, Busy("Newer streams of the same peer have taken its place."))
        joined = _Trunk(stream, peer, handle, time.monotonic(), FrameReader(self._runner.max_body(handle)))
        self._members[joined] = None
        self._watch(joined)

    def _watch(self, trunk: _Trunk) -> None:
        """After anything has come, or gone."""
        if trunk.open:
            self._count_held(trunk)
        if not trunk.open:
            return
        wanted = trunk.wants()
        if wanted == trunk.watching:
            return
        before, trunk.watching = trunk.watching, wanted
        self._listen(trunk.stream, before, wanted, partial(self._happened, trunk))

    def _count_held(self, trunk: _Trunk) -> None:
        held = trunk.held
        self._held += held - trunk.counted
        trunk.counted = held
        while self._held > MAX_HELD_BYTES:
            most = max(self._members, key=lambda one: one.counted)
            self._end(most, Busy("This peer has too much to keep in memory.", "Try another peer."))

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
            self._ready[trunk] = None
        self._watch(trunk)

    def _batch(self) -> list[tuple[_Trunk, Frame]]:
        """The oldest call of every stream that has a short one, and one that is long, in turn."""
        batch: list[tuple[_Trunk, Frame]] = []
        has_long = False
        for trunk in list(self._ready):
            is_long = SHORT * len(trunk.calls[0].body) > trunk.reader.most
            if is_long and has_long:
                continue
            has_long |= is_long
            batch.append((trunk, trunk.calls.popleft()))
            del self._ready[trunk]
            if trunk.calls:
                self._ready[trunk] = None  # behind the others
        return batch

    def _compute(self, now: float) -> None:
        batch = self._batch()
        if not batch:
            return
        try:
            answers = self._runner.compute([(trunk.handle, frame.meta, frame.body) for trunk, frame in batch])
        except Exception as error:
            log.exception("%d calls failed", len(batch))
            answers = [error] * len(batch)
        self._batches += 1
        answered = time.monotonic()
        for (trunk, frame), answer in zip(batch, answers, strict=True):
            if not trunk.open:
                continue
            if isinstance(answer, Exception):
                failed = answer if isinstance(answer, P2PModelError) else PeerFailed("This peer failed.", self._peer)
                self._end(trunk, failed)
                continue
            self._answered += 1
            trunk.asked = answered
            trunk.outbox.put_data(answer, frame.position, frame.tokens, b"")
            self._flush(trunk)

    def _flush(self, trunk: _Trunk) -> None:
        sent = trunk.outbox.sent
        trunk.outbox.flush(trunk.stream)
        if trunk.outbox.sent > sent:
            self._bytes_out += trunk.outbox.sent - sent
            trunk.active = time.monotonic()
        self._watch(trunk)

    def _end(self, trunk: _Trunk, why: P2PModelError | None) -> None:
        """`why` is None where the trunk itself has closed."""
        if not trunk.open:
            return
        trunk.open = False
        del self._members[trunk]
        self._ready.pop(trunk, None)
        self._held -= trunk.counted
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
        self._turn_away(stream, error)

    def _sweep(self, now: float) -> None:
        for trunk in [trunk for trunk in self._members if trunk.is_over(now)]:
            self._end(trunk, PeerFailed("It closed a stream that was idle, or stuck.", self._peer))

    def _end_all(self, why: P2PModelError) -> None:
        for trunk in list(self._members):
            self._end(trunk, why)
