"""Expert shards: experts of a range of layers, hosted apart from the rest of those layers, the trunk."""

from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite, log2

from p2pmodel.domain.ids import ModelId, PeerId, VersionId, check_digest, check_peer
from p2pmodel.domain.swarm import LEAST_SECONDS, MAX_LAYER, MAX_QUEUE, MOST_SECONDS, Span, is_name

MAX_EXPERTS = 2048
"""Of one layer."""
MAX_CALL_ROWS = 1024
MAX_CALL_PAIRS = 1 << 16
MAX_LOADS = 1024
"""Of a lease: a host of more experts does not say how often each is asked."""
MAX_LOAD = 127
MAX_SWAPPED = 64
"""Experts that a host takes for others at once."""


@dataclass(frozen=True)
class ExpertLease:
    """A peer's signed claim to serve `experts` of every layer of `span` that has experts, until `expires` (Unix
    seconds). experts: sorted numbers, the same in all layers; pair_seconds: measured time of one row through one
    expert, `as_claimed`; versions, queue, leaving: as in a `Lease`.

    loads: how often each of the experts was asked lately, in a layer on the mean over layers, as `load_of` has it; or
    nothing. coming, going: sorted; what it is loading, to serve it instead of what is going."""

    peer: PeerId
    model: ModelId
    span: Span
    experts: tuple[int, ...]
    dtype: str
    versions: tuple[VersionId, ...]
    pair_seconds: float
    queue: int
    leaving: bool
    expires: float
    loads: tuple[int, ...] = ()
    coming: tuple[int, ...] = ()
    going: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_peer(self.peer, "expert lease peer")
        check_digest(self.model, "expert lease model")
        for version in self.versions:
            check_digest(version, "expert lease version")
        if not self.versions or len(self.versions) > 16:
            raise ValueError("an expert lease names 1 to 16 versions")
        check_experts(self.experts)
        if not (LEAST_SECONDS <= self.pair_seconds <= MOST_SECONDS and 0 <= self.queue <= MAX_QUEUE):
            raise ValueError("expert lease figures are out of range")
        if not (isfinite(self.expires) and is_name(self.dtype)):
            raise ValueError("an expert lease's end or its dtype is out of range")
        if self.loads and (len(self.loads) != len(self.experts) or len(self.loads) > MAX_LOADS):
            raise ValueError("an expert lease says of all its experts how often they are asked, or of none")
        if any(not 0 <= load <= MAX_LOAD for load in self.loads):
            raise ValueError("an expert lease's loads are out of range")
        for some in filter(None, (self.coming, self.going)):
            check_experts(some)
        if len(self.coming) > MAX_SWAPPED or len(self.going) > MAX_SWAPPED:
            raise ValueError(f"an expert host exchanges at most {MAX_SWAPPED} experts at once")
        if not set(self.going) <= set(self.experts) or set(self.coming) & set(self.experts):
            raise ValueError("an expert host gives up what it has, for what it has not")


@dataclass(frozen=True)
class ExpertOpening:
    """The first frame of a stream from a trunk to an expert host. codec: of the rows, both ways."""

    model: ModelId
    codec: str

    def __post_init__(self) -> None:
        check_digest(self.model, "expert model")
        if not is_name(self.codec):
            raise ValueError("the codec's name is empty or too long, or not printable")


@dataclass(frozen=True)
class ExpertCall:
    """The meta of a frame of rows. pairs: how many (row, expert) there are; gradients: whether those of the rows and of
    the gates are wanted, from those of the answer, which come along."""

    layer: int
    version: VersionId
    rows: int
    pairs: int
    gradients: bool = False

    def __post_init__(self) -> None:
        check_digest(self.version, "expert version")
        if not (0 <= self.layer < MAX_LAYER and 1 <= self.rows <= MAX_CALL_ROWS):
            raise ValueError("an expert call is out of range")
        if not self.rows <= self.pairs <= MAX_CALL_PAIRS:
            raise ValueError("an expert call has at least one expert a row, and not too many")


@dataclass(frozen=True)
class MissingExpert:
    """An expert that nobody hosts whom this peer can reach."""

    layer: int
    expert: int


def load_of(rate: float) -> int:
    """In a lease: 0 for fewer than one in a minute, else in steps of a quarter of an octave, so that it takes a byte.
    rate: pairs of a row and an expert in a second."""
    return 0 if rate < 1 / 64 else min(MAX_LOAD, 1 + round(4 * log2(rate * 64)))


def rate_at(load: int) -> float:
    """The rate that such a number stands for."""
    return 2.0 ** ((load - 1) / 4) / 64 if load else 0.0


def check_experts(experts: Collection[int]) -> None:
    """Raises ValueError unless they are sorted, unique, and in range."""
    numbers = list(experts)
    if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= MAX_EXPERTS:
        raise ValueError(f"experts have to be sorted, unique, and below {MAX_EXPERTS}")


def describe(experts: Collection[int]) -> str:
    """`4-7, 9` of sorted numbers."""
    runs: list[list[int]] = []
    for number in experts:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
