"""`fisher@1`: δ̄ = Σ λᵢ·F̃ᵢ·δᵢ / Σ λᵢ·F̃ᵢ (Matena & Raffel, 2022, arXiv:2111.09832).

Nobody's Fisher is trusted: each coordinate is clipped at a multiple of the (lower) median over the patches that hold
it. With fewer than three patches the median means little. What a patch does not hold has no Fisher mass; where there is
no mass the parent's value stays.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors.merging.columns import Columns, ColumnStrategy, Workspace, weigh
from p2pmodel.tensors.merging.contributions import Parameter
from p2pmodel.tensors.merging.layout import F32, F64, fold

_INFINITY = np.float32(np.inf).view(np.uint32)


class FisherMean(ColumnStrategy):
    """Parameters: fisher_clip (2), norm_clip (3); both are multiples of a median."""

    name = "fisher@1"
    known: ClassVar = {"fisher_clip": Parameter(2.0), "norm_clip": Parameter(3.0)}
    by_fisher = True

    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        assert columns.fishers is not None
        mass = clipped(columns.fishers, given["fisher_clip"], columns.workspace)
        updates = columns.updates
        updates *= mass
        weigh(updates, columns.weights * columns.scales)
        weigh(mass, columns.weights)
        total, weighted = fold(mass), fold(updates)
        return np.divide(weighted, total, out=np.zeros_like(total), where=total > 0)


def clipped(fishers: F32, clip: float, workspace: Workspace) -> F64:
    """[P, C], not negative, at most `clip` times the lower median of those of their column that are held; in the
    workspace. Raises Rejected("finite")."""
    bounded: F64 = workspace.array("masses", fishers.shape, np.float64)
    bits = fishers.view(np.uint32)
    # As whole numbers, what is finite and not negative comes before all else, and in the same order.
    if bits.max() < _INFINITY:
        ordered = workspace.array("ordered", fishers.shape[::-1], np.uint32)
        ordered[...] = bits.T
        middle = (len(fishers) - 1) // 2
        ordered.partition(middle, axis=-1)
        median = ordered[:, middle].copy().view(np.float32)
        np.minimum(fishers, median.astype(np.float64) * clip, out=bounded)
        return bounded
    if not np.isfinite(fishers).all():
        raise Rejected("finite", "A patch holds a Fisher that is not finite.")
    positive: F32 = np.maximum(fishers, 0)
    held = fishers >= 0
    ascending = np.sort(np.where(held, positive, np.inf), axis=0)
    middles = np.maximum(held.sum(0) - 1, 0) // 2
    median = np.take_along_axis(ascending, middles[None], axis=0)[0]
    median = np.where(np.isfinite(median), median, 0)
    np.minimum(positive, median.astype(np.float64) * clip, out=bounded)
    return bounded
