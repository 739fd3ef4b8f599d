"""`task-arithmetic@1`: δ̄ = Σ λᵢ·δᵢ (Ilharco et al., 2023, arXiv:2212.04089).

With one α for all it can reach what the mean of the same weights can; it differs in what α = 1 stands for, and in that
a patch's λ says by how much of it the model moves, whatever the others are.
"""

from collections.abc import Mapping
from typing import ClassVar

from p2pmodel.tensors.merging.columns import Columns, ColumnStrategy
from p2pmodel.tensors.merging.contributions import Parameter
from p2pmodel.tensors.merging.layout import F64


class TaskArithmetic(ColumnStrategy):
    """Parameter: norm_clip (3), a multiple of the median norm."""

    name = "task-arithmetic@1"
    known: ClassVar = {"norm_clip": Parameter(3.0)}

    def unit(self, patches: int) -> float:
        return 1.0 / patches

    def rule(self, columns: Columns, given: Mapping[str, float]) -> F64:
        return columns.total()
