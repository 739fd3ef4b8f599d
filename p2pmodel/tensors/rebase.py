"""A patch's updates on another version than they were trained on, without its data.

Two models are merged, the parent with the patch and the newer version, each weighted by its Fisher (Matena & Raffel,
2022, arXiv:2111.09832); what the merge is away from the newer version is the new patch:

    δ' = w·(δ - Δ)        w = Fₚ / (Fₚ + Fᵥ)

δ is the patch, Δ the way from its parent to the version. Where neither Fisher has mass the two weigh the same, and
where the version is the parent still, and nothing of it was trained since, the patch stays as it is.
"""

import torch
from torch import Tensor

from p2pmodel.tensors.changes import NOT_HELD


def moved(update: Tensor, shift: Tensor, mass: Tensor, version_mass: Tensor | None) -> Tensor:
    """All of one slot's shape; float64. mass: of the patch, or NOT_HELD, where nothing comes of it; version_mass: None
    when it is not known, and then both weigh the same."""
    held = mass != NOT_HELD
    own = mass.double().clamp_min(0)
    others = own if version_mass is None else version_mass.double().clamp_min(0)
    total = own + others
    weight = torch.where(total > 0, own / torch.where(total > 0, total, 1.0), 0.5)
    if version_mass is not None:
        weight = torch.where((others == 0) & (shift == 0), 1.0, weight)
    return torch.where(held, weight * (update.double() - shift.double()), 0.0)
