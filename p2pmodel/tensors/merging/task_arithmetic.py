"""`task-arithmetic@1`: δ̄ = Σ λᵢ·δᵢ (Ilharco et al., 2023, arXiv:2212.04089).

With one α for all it can reach what the mean of the same weights can; it differs in what α = 1 stands for, and in that
a patch's λ says by how much of it the model moves, whatever the others are.
"""

from collections.abc import Mapping

from torch import Tensor

from p2pmodel.tensors.merging.columns import combine
from p2pmodel.tensors.merging.contributions import Contributions, Parameter, chosen

_KNOWN = {"norm_clip": Parameter(3.0)}


class TaskArithmetic:
    """Parameter: norm_clip (3), a multiple of the median norm."""

    name = "task-arithmetic@1"

    def check(self, parameters: Mapping[str, float]) -> None:
        chosen(self.name, parameters, _KNOWN)

    def unit(self, patches: int) -> float:
        return 1.0 / patches

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Contributions, parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        clip = chosen(self.name, parameters, _KNOWN)["norm_clip"]
        return combine(parent, contributions, lambda columns: columns.total(), clip)
