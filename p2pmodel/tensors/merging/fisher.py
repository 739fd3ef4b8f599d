"""`fisher@1`: δ̄ = Σ λᵢ·F̃ᵢ·δᵢ / Σ λᵢ·F̃ᵢ (Matena & Raffel, 2022, arXiv:2111.09832).

Nobody's Fisher is trusted: each coordinate is clipped at a multiple of the (lower) median over the patches that hold
it. With fewer than three patches the median means little. What a patch does not hold has no Fisher mass; where there is
no mass the parent's value stays.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from p2pmodel.tensors.merging.columns import Columns, ColumnStrategy
from p2pmodel.tensors.merging.contributions import Parameter
from p2pmodel.tensors.merging.layout import F32, F64, fold


class FisherMean(ColumnStrategy):
    """Parameters: fisher_clip (2), norm_clip (3); both are multiples of a median."""

    name = "fisher@1"
    known: ClassVar = {"fisher_clip": Parameter(2.0), "norm_clip": Parameter(3.0)}

    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        mass = clipped(columns.fishers, given["fisher_clip"])
        updates = columns.updates
        updates *= mass
        updates *= (columns.weights * columns.scales)[:, None]
        mass *= columns.weights[:, None]
        total, weighted = fold(mass), fold(updates)
        return np.divide(weighted, total, out=np.zeros_like(total), where=total > 0)


def clipped(fishers: F32, clip: float) -> F64:
    """[P, C], not negative, at most `clip` times the lower median of those of their column that are held."""
    positive: F32 = np.maximum(fishers, 0)
    held = fishers >= 0
    if held.all():
        middle = (len(fishers) - 1) // 2
        median = np.partition(positive.T.copy(), middle, axis=-1)[:, middle]
    else:
        ordered = np.sort(np.where(held, positive, np.inf), axis=0)
        middles = np.maximum(held.sum(0) - 1, 0) // 2
        median = np.take_along_axis(ordered, middles[None], axis=0)[0]
        median = np.where(np.isfinite(median), median, 0)
    bounded: F64 = np.minimum(positive, median.astype(np.float64) * clip)
    return bounded
