"""`mean@1`: δ̄ = Σ λᵢ·δᵢ / Σ λᵢ. What a patch does not hold counts as unchanged."""

from collections.abc import Mapping
from math import inf

from torch import Tensor

from p2pmodel.tensors.merging.columns import combine
from p2pmodel.tensors.merging.contributions import Contributions, Parameter, chosen

_KNOWN = {"norm_clip": Parameter(inf)}


class PlainMean:
    """Parameter: norm_clip, a multiple of the median norm; no limit when it is not given."""

    name = "mean@1"

    def check(self, parameters: Mapping[str, float]) -> None:
        chosen(self.name, parameters, _KNOWN)

    def unit(self, patches: int) -> float:
        return 1.0

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Contributions, parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        clip = chosen(self.name, parameters, _KNOWN)["norm_clip"]
        return combine(parent, contributions, lambda columns: columns.total() / columns.weight, clip)
