"""A session as one stage sees it, and the counts of all of them."""

import selectors
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from p2pmodel.domain.bounds import FORWARD_SECONDS, QUEUE_SECONDS, SESSIONS
from p2pmodel.domain.tally import Tally
from p2pmodel.logic.vigil import Progress
from p2pmodel.swarm.admission import Admitted
from p2pmodel.swarm.framing import Frame, FrameReader, Outbox

OUTBOX_BYTES = 8 << 20
"""A session whose next hop is this far behind is not read any further."""


@dataclass(frozen=True)
class ChainStats:
    """sessions: open now; the others are totals since the start. frames, tokens: through the runner; gradients: of
    micro-batches; step_seconds: spent in it; bytes: of the frames, with their headers; failed: sessions refused, or
    ended by an error; phases: seconds of a forward by what it was of, `decode`, `prefill` or `training`, and of a
    `backward`; queued: seconds from when a step was read to when it was taken up; together: sessions in a forward.
    Tallies go on growing."""

    sessions: int
    opened: int
    frames: int
    tokens: int
    gradients: int
    bytes_in: int
    bytes_out: int
    batches: int
    step_seconds: float
    failed: int
    phases: Mapping[str, Tally]
    queued: Tally
    together: Tally


class Counts:
    """What the compute thread adds up; read from other threads as it is."""

    def __init__(self) -> None:
        self.opened = self.frames = self.tokens = self.gradients = self.bytes_in = self.bytes_out = self.batches = (
            self.failed
        ) = 0
        self.step_seconds = 0.0
        self.phases = {name: Tally(FORWARD_SECONDS) for name in ("decode", "prefill", "training", "backward")}
        self.queued, self.together = Tally(QUEUE_SECONDS), Tally(SESSIONS)


@dataclass(slots=True)
class Passes:
    """In one direction: frames that came, and that were answered."""

    taken: int = 0
    given: int = 0


class StageSession:
    """An open session on one stage: its two streams, and what is between them. The compute thread's alone.

    frames, gradients: arrived from before and from behind, not computed yet; outbox, backbox: what waits for the next
    hop, and for the one before; watching: the events that the selector reports of each stream; active: when bytes last
    moved; read: when frames last came.
    """

    def __init__(self, admitted: Admitted, now: float) -> None:
        request = admitted.opening.request
        self.handle = admitted.handle
        self.name, self.start, self.training = request.session, request.span.start, request.training
        self.client, self.max_tokens = admitted.opening.client, request.max_tokens
        self.before, self.before_peer = admitted.before, admitted.before_peer
        self.after, self.after_peer = admitted.after, admitted.after_peer
        self.is_last = not admitted.opening.hops
        self.incoming, self.returning, self.outbox, self.backbox = FrameReader(), FrameReader(), Outbox(), Outbox()
        self.frames: deque[Frame] = deque()
        self.gradients: deque[Frame] = deque()
        self.open = True
        self.watching = {self.before: 0, self.after: 0}
        self.forwards, self.backwards = Passes(), Passes()
        self.active = self.read = now

    @property
    def next_frame(self) -> Frame | None:
        """Gradients first: they free memory."""
        queue = self.gradients or self.frames
        return queue[0] if queue else None

    def take_frame(self) -> Frame:
        return (self.gradients or self.frames).popleft()

    def events(self, stream: socket.socket) -> int:
        """What the selector has to report. A session that is ahead of its computation, or of the hop that takes its
        results, is left in the kernel's buffers."""
        ahead, results, waits = (
            (self.frames, self.outbox, self.backbox)
            if stream is self.before
            else (self.gradients, self.backbox, self.outbox)
        )
        reading = not ahead and results.size <= OUTBOX_BYTES
        return (selectors.EVENT_READ if reading else 0) | (selectors.EVENT_WRITE if waits.size else 0)

    def progress(self, now: float) -> Progress:
        there, back = self.forwards, self.backwards
        return Progress(there.taken, there.given, max(0.0, now - self.active), back.taken, back.given)
