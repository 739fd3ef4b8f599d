"""Merging patches, so that every peer gets the same bits.

    θ = parent + α·δ̄

What δ̄ is of the patches' updates δᵢ says the strategy that the Manifest names, each in a module of its own. All is
float64 on the CPU, elementwise operations in a fixed order only (IEEE 754 rounds each of them exactly; sums go by
`layout.fold`, never by a library's reduction), patches in the order of their ids, and one cast at the end.

Every strategy clips the norm of each update at a multiple of the median norm, where its parameter `norm_clip` says so,
and can be given a `momentum`, see the module of that name.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import cast

import torch
from torch import Tensor

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.model import MOMENTUM, MergeSpec
from p2pmodel.tensors.merging.contributions import Contribution, MergeStrategy
from p2pmodel.tensors.merging.coordinate_median import CoordinateMedian
from p2pmodel.tensors.merging.fisher import FisherMean
from p2pmodel.tensors.merging.mean import PlainMean
from p2pmodel.tensors.merging.task_arithmetic import TaskArithmetic
from p2pmodel.tensors.merging.ties import Ties

__all__ = ["BUILT_IN", "GROUP", "Contribution", "MergeStrategy", "apply_update", "check", "get_strategy"]

GROUP = "p2pmodel.merge_strategies"
_BUILT_IN: dict[str, MergeStrategy] = {
    strategy.name: strategy for strategy in (FisherMean(), PlainMean(), TaskArithmetic(), Ties(), CoordinateMedian())
}
BUILT_IN = tuple(_BUILT_IN)


def get_strategy(name: str) -> MergeStrategy:
    """A built-in one, or what an entry point of the group `p2pmodel.merge_strategies` names. Raises NotFound."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for entry in entry_points(group=GROUP, name=name):
        return cast(MergeStrategy, entry.load())
    raise NotFound(
        f"Merge strategy {name[:64]!r} is not known here.",
        f"Install the package that provides it; built in are {', '.join(BUILT_IN)}.",
    )


def check(spec: MergeSpec) -> None:
    """Raises NotFound for a strategy that is not known here, Rejected("schema") for parameters that it does not
    take."""
    if not 0 <= spec.momentum < 1:
        raise Rejected(
            "schema", f"An outer momentum cannot be {spec.momentum:g}.", f"Use {MOMENTUM}=0.3, or another below 1."
        )
    get_strategy(spec.strategy).check(spec.of_strategy)


def apply_update(parent: Mapping[str, Tensor], update: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """parent + α·update, in float64, cast once to the parent's dtype. Raises Rejected("finite")."""
    result = {}
    for name in sorted(parent):
        value = parent[name]
        if name in update:
            value = (value.to(torch.float64) + update[name].to(torch.float64) * alpha).to(value.dtype)
        if not bool(torch.isfinite(value).all()):
            raise Rejected("finite", f"The merge of slot {name} is not finite.")
        result[name] = value.clone()
    return result
