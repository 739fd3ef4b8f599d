"""What every strategy shares: its parameters, and the walk through the columns of all patches.

The slots are laid end to end, sorted by name, and worked through in blocks of columns for all patches at once, since
medians and votes need all of them. What a block takes is bounded, however many patches there are, and of patches that
are read where they are looked at no more is ever held. (Two threads over blocks gain nothing: most of the steps are so
short that they wait for each other.)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors.merging.contributions import Contribution, Parameter, chosen
from p2pmodel.tensors.merging.layout import F32, F64, Layout, fold
from p2pmodel.tensors.merging.survey import Measure, Survey, survey

BLOCK_ELEMENTS = 16 << 20
"""Of what is held at a time of all patches (patches × columns), of values and of Fishers."""
CACHED_ELEMENTS = 1 << 17
"""Of what is computed at a time, so that it stays in the processor's cache. It does not change the result."""


class Workspace:
    """Arrays that are used again for every block: pages fresh from the system cost more than what is computed in
    them."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Of any content; until it is asked for by this name again."""
        size = prod(shape) * np.dtype(dtype).itemsize
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = np.empty(size, np.uint8)
        part: NDArray[Any] = self._held[name][:size].view(dtype).reshape(shape)
        return part


@dataclass(frozen=True)
class Columns:
    """Some columns of all P patches. updates [P, C], not scaled yet, and to be overwritten; fishers [P, C], with
    NOT_HELD, where the strategy goes by them; weights [P]: λ; scales [P]: what brings each patch's norm within the
    limit, 1 or less; measures [P]: the strategy's own."""

    updates: F64
    fishers: F32 | None
    weights: F64
    scales: F64
    measures: F64 | None
    workspace: Workspace

    def total(self) -> F64:
        """Σ λᵢ·sᵢ·δᵢ, overwriting the updates. -> [C]"""
        weigh(self.updates, self.weights * self.scales)
        return fold(self.updates)

    @property
    def weight(self) -> F64:
        """Σ λᵢ."""
        return fold(self.weights.copy())


def weigh(rows: F64, weights: F64) -> None:
    """Each row [P, C] by its weight [P], in place."""
    if (weights != 1.0).any():
        rows *= weights[:, None]


class ColumnStrategy(ABC):
    """Implements `MergeStrategy` for all but its rule. known: its parameters; `norm_clip` is the largest norm of an
    update, as a multiple of the lower median norm. by_fisher: whether it looks at Fishers."""

    name: str
    known: ClassVar[Mapping[str, Parameter]]
    by_fisher: ClassVar[bool] = False

    @abstractmethod
    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        """The merged update [C] of some columns, the same whatever columns it is given at a time. given: all of the
        parameters. Raises Rejected("finite")."""

    def measure(self, given: Mapping[str, float]) -> Measure | None:
        """What `Columns.measures` are to be, of all of an update."""
        return None

    def check(self, parameters: Mapping[str, float]) -> None:
        chosen(self.name, parameters, self.known)

    def unit(self, patches: int) -> float:
        return 1.0

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Sequence[Contribution], parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        given = chosen(self.name, parameters, self.known)
        layout = Layout(parent)
        found = survey(layout, contributions, self.measure(given))
        scales = _norm_scales(found.norms, given["norm_clip"])
        result: F64 = np.empty(layout.size, np.float64)
        for begin, end, columns in _walk(layout, contributions, found, scales, self.by_fisher):
            result[begin:end] = self.rule(columns, given)
        if not np.isfinite(result).all():
            raise Rejected("finite", "The patches' values are too large to be merged.")
        return layout.split(result)


def _walk(
    layout: Layout, contributions: Sequence[Contribution], found: Survey, scales: F64, by_fisher: bool
) -> Iterator[tuple[int, int, Columns]]:
    """[begin, end) and what is there. Each is to be done with before the next is asked for."""
    workspace, patches = Workspace(), len(contributions)
    relative = np.array([contribution.relative for contribution in contributions], bool)
    width, step = max(1, BLOCK_ELEMENTS // patches), max(16, CACHED_ELEMENTS // patches)
    for first in range(0, layout.size, width):
        last = min(first + width, layout.size)
        values = workspace.array("values", (patches, last - first), layout.dtype)
        fishers = workspace.array("fishers", values.shape, np.float32) if by_fisher else None
        for row, contribution in enumerate(contributions):
            values[row] = layout.values(contribution.adapter, contribution.relative, first, last)
            if fishers is not None:
                fishers[row] = layout.fisher(contribution.fisher, first, last)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            here = slice(begin - first, end - first)
            updates = workspace.array("updates", (patches, end - begin), np.float64)
            if relative.any():
                updates[...] = values[:, here]
                updates[~relative] -= layout.parent[begin:end]
            else:
                np.subtract(values[:, here], layout.parent[begin:end], out=updates)
            masses = None if fishers is None else fishers[:, here]
            yield begin, end, Columns(updates, masses, found.weights, scales, found.measures, workspace)


def _norm_scales(norms: F64, clip: float) -> F64:
    """Of each patch: what brings its norm down to clip × the lower median norm; 1 where it is below."""
    if clip == inf:
        return np.ones_like(norms)
    limit = np.sort(norms)[(len(norms) - 1) // 2] * clip
    scales: F64 = np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
    return scales
