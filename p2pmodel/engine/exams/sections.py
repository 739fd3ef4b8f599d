"""What a section of a suite is: cases in a tuning and a deciding part, and a way to measure a model on each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from p2pmodel.engine.evaluation import Continuation
from p2pmodel.engine.exams.bench import Bench
from p2pmodel.engine.exams.rows import Split

Case = TypeVar("Case")


@dataclass(frozen=True)
class Measured:
    """Of some cases, in their order: `amounts` (nats, or 1 for a failed case and 0 for one that is right), and
    `weights` (bytes, or 1). Lower is better."""

    amounts: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def score(self) -> float:
        return sum(self.amounts) / sum(self.weights)


class Section(Protocol):
    """`name` is what its score goes by: that of a domain, or `KIND/NAME` for a share of failed cases; `tolerance`: how
    much worse than its parent's a version's score may be, relative for a domain, absolute for a share, None for the
    Manifest's; `strict`: nothing that a single patch makes worse may enter a merge either."""

    @property
    def name(self) -> str: ...

    @property
    def tolerance(self) -> float | None: ...

    @property
    def strict(self) -> bool: ...

    def count(self, split: Split) -> int: ...

    def weights(self, split: Split) -> tuple[float, ...]: ...

    def references(self, split: Split) -> Sequence[Continuation]:
        """What `measure` needs the base version's nats of: `Bench.reference` has them then."""

    def measure(self, bench: Bench, split: Split, cases: Sequence[int]) -> Measured:
        """Of the cases with these numbers, with the model as it is now."""


@dataclass(frozen=True)
class Questions(Generic[Case]):
    """What the sections that count failures have in common."""

    name: str
    tolerance: float | None
    tune: tuple[Case, ...]
    test: tuple[Case, ...]

    def cases(self, split: Split) -> tuple[Case, ...]:
        return self.tune if split == "tune" else self.test

    def count(self, split: Split) -> int:
        return len(self.cases(split))

    def weights(self, split: Split) -> tuple[float, ...]:
        return (1.0,) * self.count(split)

    def references(self, split: Split) -> Sequence[Continuation]:
        return ()


def failures(failed: Sequence[bool]) -> Measured:
    return Measured(tuple(float(value) for value in failed), (1.0,) * len(failed))
