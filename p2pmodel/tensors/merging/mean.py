"""`mean@1`: δ̄ = Σ λᵢ·δᵢ / Σ λᵢ. What a patch does not hold counts as unchanged."""

from collections.abc import Mapping
from math import inf
from typing import ClassVar

from p2pmodel.tensors.merging.columns import Columns, ColumnStrategy
from p2pmodel.tensors.merging.contributions import Parameter
from p2pmodel.tensors.merging.layout import F64


class PlainMean(ColumnStrategy):
    """Parameter: norm_clip, a multiple of the median norm; no limit when it is not given."""

    name = "mean@1"
    known: ClassVar = {"norm_clip": Parameter(inf)}

    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        return columns.total() / columns.weight
