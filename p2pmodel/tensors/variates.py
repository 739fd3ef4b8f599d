"""The mean of a round's control variates, which its version carries: what contributors turn their gradients by.

cᵢ is the mean gradient of a contributor's training; the next one takes steps along g + mean(c) - cᵢ, so that what only
one's own data want does not pull everybody apart (SCAFFOLD: Karimireddy et al., 2020, arXiv:1910.06378).

A cᵢ can lie as an update can: its norm is clipped at a multiple of the median norm. The mean is taken by the same
arithmetic as the merge, so that every peer gets the same bits, over the patches of kinds whose trained parameters are
slots (`Fit.SLOTS`): those of (IA)³ and of dense patches. Masks differ from patch to patch, so FISH patches have no
common mean. The blob holds it in bfloat16, by slot: in four bits, as the cᵢ are, what rounding leaves of
Σ (mean(c) - cᵢ) would pull all contributors the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob
from p2pmodel.tensors.kinds import get_kind, slots_of
from p2pmodel.tensors.merging import Contribution
from p2pmodel.tensors.merging.mean import PlainMean
from p2pmodel.tensors.patch_kind import Fit

NORM_CLIP = 3.0


@dataclass(frozen=True)
class Variate:
    """A patch's control variate: `gradient` by slot."""

    patch: PatchId
    kind: str
    gradient: Mapping[str, Tensor]
    weight: float


def write_mean(variates: Sequence[Variate], kinds: Sequence[str], slots: Sequence[Slot]) -> bytes | None:
    """The blob; None when no patch has a control variate that counts. variates: sorted by patch id. kinds, slots: the
    lineage's. Raises Rejected."""
    mean: dict[str, Tensor] = {}
    for prefix, own in _slots(kinds, slots).items():
        given = [
            Contribution(variate.patch, variate.gradient, {}, variate.weight, relative=True)
            for variate in variates
            if has_mean(variate.kind) and get_kind(variate.kind).prefix == prefix
        ]
        if any(contribution.weight for contribution in given):
            zero = {slot.name: torch.zeros(slot.shape) for slot in own}
            found = PlainMean().combine(zero, given, {"norm_clip": NORM_CLIP})
            mean |= {name: tensor.to(torch.float32).to(torch.bfloat16) for name, tensor in found.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in mean.values()):
        raise Rejected("finite", "The control variates are too large for their mean to be written.")
    return blob.pack(mean) if mean else None


def read_mean(raw: bytes, kinds: Sequence[str], slots: Sequence[Slot], limit: int) -> dict[str, Tensor]:
    """By slot, float32: of all slots of the kinds that any patch of the round had a control variate of. Raises
    Rejected."""
    own = _slots(kinds, slots)
    expected = [replace(slot, dtype="bfloat16") for slots_of_prefix in own.values() for slot in slots_of_prefix]
    found = blob.unpack(raw, expected, limit)
    missing = [{slot.name for slot in slots_of_prefix} - found.keys() for slots_of_prefix in own.values()]
    if not found or any(few and len(few) < len(all_) for few, all_ in zip(missing, own.values(), strict=True)):
        raise Rejected("shape", "A mean of control variates has to hold all slots of a kind.")
    return {name: tensor.to(torch.float32) for name, tensor in found.items()}


def has_mean(kind: str) -> bool:
    """Raises NotFound."""
    return get_kind(kind).fit is Fit.SLOTS


def _slots(kinds: Sequence[str], slots: Sequence[Slot]) -> dict[str, tuple[Slot, ...]]:
    """By the prefix of kinds."""
    known = [get_kind(kind) for kind in kinds if has_mean(kind)]
    return {kind.prefix: slots_of(kind, slots) for kind in known}
