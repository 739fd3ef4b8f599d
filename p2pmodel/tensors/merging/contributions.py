"""What a merge strategy is given, and what it is: an extension point."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId


@dataclass(frozen=True)
class Contribution:
    """A patch as the merge sees it: `adapter` and `fisher` by slot name, `weight` the maintainers' λ ≥ 0. relative:
    the adapter holds updates; else it holds values, which the updates lead to. A Fisher of `changes.NOT_HELD` is of a
    value that the patch does not hold."""

    patch: PatchId
    adapter: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    weight: float
    relative: bool = False


class MergeStrategy(Protocol):
    @property
    def name(self) -> str: ...

    def check(self, parameters: Mapping[str, float]) -> None:
        """Raises Rejected("schema") for parameters that the strategy does not take."""

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Sequence[Contribution], parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The update δ̄ of every slot of the parent, float64, before the scale α. contributions: sorted by patch id;
        their tensors may be `changes.Lazy`, and are best looked at in parts then.

        Raises Rejected("schema" | "shape" | "finite") for parameters, orders or tensors that cannot be merged.
        """

    def unit(self, patches: int) -> float:
        """The α at which the update of so many equal patches is each one's own: 1 for a mean, 1/n for a sum. The
        search for α begins there."""


@dataclass(frozen=True)
class Parameter:
    """A number in (0, highest]; default: when it is not given."""

    default: float
    highest: float = float("inf")


def chosen(strategy: str, given: Mapping[str, float], known: Mapping[str, Parameter]) -> dict[str, float]:
    """All of the parameters, with the defaults of what is not given. Raises Rejected("schema")."""
    for name, value in given.items():
        if name not in known or not (isfinite(value) and 0 < value <= known[name].highest):
            raise Rejected(
                "schema",
                f"Merge strategy {strategy} takes no parameter {name[:64]!r} of {value}.",
                f"It takes {', '.join(sorted(known))}.",
            )
    return {name: parameter.default for name, parameter in known.items()} | dict(given)
