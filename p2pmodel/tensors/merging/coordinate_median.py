"""`coordinate-median@1`: of each coordinate the median of the updates (Yin et al., 2018, arXiv:1803.01498), weighted by
λ: half of the weight lies on either side; between two values their mean.

What a patch does not hold counts as unchanged, so that a coordinate moves only when more than half of the weight moves
it the same way. Sparse patches of different masks therefore hardly move anything.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from p2pmodel.tensors.merging.columns import Columns, ColumnStrategy
from p2pmodel.tensors.merging.contributions import Parameter
from p2pmodel.tensors.merging.layout import F64


class CoordinateMedian(ColumnStrategy):
    """Parameter: norm_clip (3), a multiple of the median norm."""

    name = "coordinate-median@1"
    known: ClassVar = {"norm_clip": Parameter(3.0)}

    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        updates, weights = columns.updates, columns.weights
        updates *= columns.scales[:, None]
        if (weights == weights[0]).all():
            updates.sort(axis=0)
            low, high = (len(updates) - 1) // 2, len(updates) // 2
            return _between(updates[low], updates[high])
        order = np.argsort(updates, axis=0, kind="stable")
        updates = np.take_along_axis(updates, order, axis=0)
        reached = np.add.accumulate(weights[order], axis=0)
        half = reached[-1] / 2
        first = (reached >= half).argmax(axis=0)[None]
        after = (reached > half).argmax(axis=0)[None]
        return _between(*(np.take_along_axis(updates, at, axis=0)[0] for at in (first, after)))


def _between(low: F64, high: F64) -> F64:
    # Halved before they are added, since the sum of two finite numbers need not be finite.
    middle: F64 = low * 0.5 + high * 0.5
    return middle
