"""A session as one stage sees it, and the counts of all of them."""

from collections import deque
from dataclasses import dataclass

from p2pmodel.logic.vigil import Progress
from p2pmodel.swarm.admission import Admitted
from p2pmodel.swarm.framing import Frame, FrameReader, Outbox


@dataclass(frozen=True)
class ChainStats:
    """sessions: open now; the others are totals since the start. frames, tokens: through the runner; step_seconds:
    spent in it; bytes: of the frames, with their headers; failed: sessions refused, or ended by an error."""

    sessions: int
    opened: int
    frames: int
    tokens: int
    bytes_in: int
    bytes_out: int
    batches: int
    step_seconds: float
    failed: int


class Counts:
    """What the compute thread adds up; read from other threads as it is."""

    def __init__(self) -> None:
        self.opened = self.frames = self.tokens = self.bytes_in = self.bytes_out = self.batches = self.failed = 0
        self.step_seconds = 0.0


class StageSession:
    """An open session on one stage: its two streams, and what is between them. The compute thread's alone.

    reading, writing: what the selector watches; frames: arrived, not computed yet; taken, given: DATA frames that came
    and that were answered; active: when bytes last moved.
    """

    def __init__(self, admitted: Admitted, now: float) -> None:
        self.handle = admitted.handle
        self.name, self.start = admitted.opening.request.session, admitted.opening.request.span.start
        self.client, self.max_tokens = admitted.opening.client, admitted.opening.request.max_tokens
        self.before, self.before_peer = admitted.before, admitted.before_peer
        self.after, self.after_peer = admitted.after, admitted.after_peer
        self.incoming, self.returning, self.outbox = FrameReader(), FrameReader(), Outbox()
        self.frames: deque[Frame] = deque()
        self.reading = self.open = True
        self.writing = False
        self.taken = self.given = 0
        self.active = now

    def progress(self, now: float) -> Progress:
        return Progress(self.taken, self.given, max(0.0, now - self.active))
