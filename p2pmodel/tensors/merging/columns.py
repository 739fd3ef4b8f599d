"""What every strategy shares: its parameters, and the walk through the columns of all patches.

The slots are laid end to end, sorted by name, and worked through in blocks of columns for all patches at once, since
medians and votes need all of them; what a block takes is bounded, however many patches there are. A lineage of (IA)³
vectors is one block, and is read once; the more there is, the more often `contributions` is called and its tensors are
read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors.merging.contributions import Contributions, Parameter, chosen
from p2pmodel.tensors.merging.layout import F32, F64, Layout, Measure, fold, gather, survey, updates_of

BLOCK_ELEMENTS = 16 << 20
"""Of what is held at a time of all patches (patches × columns), of values and of Fishers."""
CACHED_ELEMENTS = 1 << 16
"""Of what is computed at a time, so that it stays in the processor's cache. It does not change the result."""


@dataclass(frozen=True)
class Columns:
    """Some columns of all P patches. updates [P, C], not scaled yet, and to be overwritten; fishers [P, C], with
    NOT_HELD; weights [P]: λ; scales [P]: what brings each patch's norm within the limit, 1 or less; measures [P]: the
    strategy's own."""

    updates: F64
    fishers: F32
    weights: F64
    scales: F64
    measures: F64 | None

    def total(self) -> F64:
        """Σ λᵢ·sᵢ·δᵢ, overwriting the updates. -> [C]"""
        self.updates[...] *= (self.weights * self.scales)[:, None]
        return fold(self.updates)

    @property
    def weight(self) -> F64:
        """Σ λᵢ."""
        return fold(self.weights.copy())


class ColumnStrategy(ABC):
    """Implements `MergeStrategy` for all but its rule. known: its parameters; `norm_clip` is the largest norm of an
    update, as a multiple of the lower median norm."""

    name: str
    known: ClassVar[Mapping[str, Parameter]]

    @abstractmethod
    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        """The merged update [C] of some columns, the same whatever columns it is given at a time. given: all of the
        parameters."""

    def measure(self, given: Mapping[str, float]) -> Measure | None:
        """What `Columns.measures` are to be, of all of an update."""
        return None

    def check(self, parameters: Mapping[str, float]) -> None:
        chosen(self.name, parameters, self.known)

    def unit(self, patches: int) -> float:
        return 1.0

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Contributions, parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        given = chosen(self.name, parameters, self.known)
        layout = Layout(parent)
        found = survey(layout, contributions, self.measure(given), BLOCK_ELEMENTS, CACHED_ELEMENTS)
        scales = _norm_scales(found.norms, given["norm_clip"])
        patches = len(scales)
        columns = layout.size if found.block else max(1, BLOCK_ELEMENTS // patches)
        step = max(16, CACHED_ELEMENTS // patches)
        result = np.empty(layout.size, np.float64)
        for begin in range(0, layout.size, columns):
            end = min(begin + columns, layout.size)
            values, fishers = found.block or gather(layout, contributions, patches, begin, end)
            for low in range(begin, end, step):
                high = min(low + step, end)
                here = slice(low - begin, high - begin)
                updates = updates_of(values[:, here], layout.parent[low:high], found.relative)
                some = Columns(updates, fishers[:, here], found.weights, scales, found.measures)
                result[low:high] = self.rule(some, given)
        if not np.isfinite(result).all():
            raise Rejected("finite", "The patches' values are too large to be merged.")
        return layout.split(result)


def _norm_scales(norms: F64, clip: float) -> F64:
    """Of each patch: what brings its norm down to clip × the lower median norm; 1 where it is below."""
    if clip == inf:
        return np.ones_like(norms)
    limit = np.sort(norms)[(len(norms) - 1) // 2] * clip
    scales: F64 = np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
    return scales
