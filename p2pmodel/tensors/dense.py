"""Dense patches: an update of every weight of the layers. The blob holds the updates against the parent, by slot, or
all of them in four bits."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob, fourbit
from p2pmodel.tensors.changes import Change, factored_places, factors, slot_places
from p2pmodel.tensors.weights import Ground, WeightTrainee, leaf


class Trainee(WeightTrainee):
    """Its parameters are the updates, so that a weight decay draws towards the parent."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        self.parameters = {slot: leaf(torch.zeros_like(weight)) for slot, weight in sorted(ground.weights.items())}

    def weights(self) -> dict[str, Tensor]:
        return {slot: self._ground.weights[slot] + update for slot, update in self.parameters.items()}

    def adapter(self) -> dict[str, Tensor]:
        return {slot: update.detach().to("cpu", copy=True) for slot, update in self.parameters.items()}

    def reduced(self, slot: str, squares: Tensor) -> dict[str, Tensor]:
        return factors(slot, squares)


def read(raw: bytes, slots: Sequence[Slot], limit: int) -> Change:
    """Raises Rejected."""
    values = fourbit.decode(raw, slot_places(slots), limit) if fourbit.holds(raw) else blob.unpack(raw, slots, limit)
    if not values:
        raise Rejected("shape", "The patch changes nothing.")
    places = sorted(place for slot, update in values.items() for place in factored_places(slot, tuple(update.shape)))
    return Change(values, True, tuple(places))


def fisher_of(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the Fisher blob keeps of values by parameter that stand for a Fisher."""
    return {name: part for slot, moment in moments.items() for name, part in factors(slot, moment).items()}
