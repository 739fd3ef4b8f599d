"""`ties@1`: trim, elect a sign, and take the mean of those who agree (Yadav et al., 2023, arXiv:2306.01708).

Of each update the share `density` with the largest magnitudes stays. In each coordinate the sign with the larger sum of
λᵢ·|δᵢ| is elected, and δ̄ is the mean, weighted by λ, over the patches whose trimmed update has that sign.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import numpy as np

from p2pmodel.tensors.merging.columns import Columns, ColumnStrategy
from p2pmodel.tensors.merging.contributions import Parameter
from p2pmodel.tensors.merging.layout import F64, fold
from p2pmodel.tensors.merging.survey import Measure


class Ties(ColumnStrategy):
    """Parameters: density (0.2), the share of each update that stays; norm_clip (3), a multiple of the median norm."""

    name = "ties@1"
    known: ClassVar = {"density": Parameter(0.2, highest=1.0), "norm_clip": Parameter(3.0)}

    def measure(self, given: Mapping[str, float]) -> Measure:
        return partial(_smallest_kept, given["density"])

    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        assert columns.measures is not None
        updates = columns.updates
        updates[np.abs(updates) < columns.measures[:, None]] = 0.0
        updates *= columns.scales[:, None]
        weighted = updates * columns.weights[:, None]
        elected = np.sign(fold(weighted.copy()))
        agree = (np.sign(updates) == elected) & (elected != 0)
        total = fold(np.where(agree, columns.weights[:, None], 0.0))
        return np.divide(fold(np.where(agree, weighted, 0.0)), total, out=np.zeros_like(total), where=total > 0)


def _smallest_kept(density: float, update: F64) -> float:
    """The magnitude from which on a value stays; those that are equal to it stay too."""
    at = len(update) - max(1, round(density * len(update)))
    return float(np.partition(np.abs(update), at)[at])
