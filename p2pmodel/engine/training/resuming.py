"""How far a training has come, as bytes; where they are kept is not known here."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from p2pmodel.domain.ids import Digest, check_digest
from p2pmodel.wire import canonical

MAX_PROGRESS_BYTES = 64 << 20


@dataclass(frozen=True)
class Progress:
    """After `step` steps. state: the optimiser's blob; gradients: the blob of their sums, where they are summed up;
    checkpoints, states: of every checkpoint so far the adapter's and the optimiser's blob. best: which of them has the
    lowest loss on what is held out; held_out: that loss at each. losses: of every step. All in nats per token."""

    step: int
    state: Digest
    gradients: Digest | None
    checkpoints: tuple[Digest, ...]
    states: tuple[Digest, ...]
    held_out: tuple[float, ...]
    losses: tuple[float, ...]
    tokens: int

    def __post_init__(self) -> None:
        for digest in (self.state, *self.checkpoints, *self.states):
            check_digest(digest, "training state")
        if not len(self.checkpoints) == len(self.states) == len(self.held_out) >= 1:
            raise ValueError("the checkpoints of a training do not belong together")
        if len(self.losses) != self.step or not all(map(isfinite, (*self.held_out, *self.losses))):
            raise ValueError("the losses of a training do not belong to its steps")

    @property
    def best(self) -> int:
        return best_of(self.held_out)

    def encode(self) -> bytes:
        return canonical.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> "Progress":
        """Raises Rejected."""
        return canonical.decode(raw, cls, MAX_PROGRESS_BYTES)


def best_of(held_out: Sequence[float]) -> int:
    """The earliest checkpoint with the lowest loss."""
    return held_out.index(min(held_out))


class Keeper(Protocol):
    """Where a training keeps what it needs to go on after its process was killed, at any moment."""

    def keep(self, raw: bytes) -> Digest:
        """Durable when this returns."""

    def load(self, digest: Digest) -> bytes:
        """Raises P2PModelError when it is not there any more."""

    def found(self) -> Progress | None:
        """The last one that was noted."""

    def note(self, progress: Progress) -> None:
        """From now on this is the last one; what only the one before needed may go."""


class MemoryKeeper:
    """For a training that nobody has to resume: holds what its end needs."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, bytes] = {}

    def keep(self, raw: bytes) -> Digest:
        digest = canonical.digest(raw)
        self._blobs[digest] = raw
        return digest

    def load(self, digest: Digest) -> bytes:
        return self._blobs[digest]

    def found(self) -> Progress | None:
        return None

    def note(self, progress: Progress) -> None:
        needed = {progress.state, progress.states[progress.best], progress.gradients}
        self._blobs = {digest: raw for digest, raw in self._blobs.items() if digest in needed}
