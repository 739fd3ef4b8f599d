"""Dense patches: an update of every weight of the layers. The blob holds the updates against the parent, by slot, or
all of them in four bits."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob, fourbit
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change, factored_places, factors, laid_out, slot_places
from p2pmodel.tensors.patch_kind import Fit, Lesson
from p2pmodel.tensors.weights import FactoredKind, Ground, WeightTrainee, leaf


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


def read(raw: Raw, slots: Sequence[Slot], limit: int) -> Change:
    """Raises Rejected."""
    values: Mapping[str, Tensor]
    if fourbit.holds(raw):
        values = fourbit.Decoded(raw, slot_places(slots), limit)
    else:
        values = laid_out(blob.unpack(raw, slots, limit))
    if not values:
        raise Rejected("shape", "The patch changes nothing.")
    shapes = {slot.name: slot.shape for slot in slots}
    places = sorted(place for slot in values for place in factored_places(slot, shapes[slot]))
    return Change(values, True, tuple(places))


class Kind(FactoredKind):
    """See `patch_kind.PatchKind`."""

    name, bytes_each, learning_rate = "dense@1", 6, 5e-4
    options: tuple[str, ...] = ()
    fit, continued = Fit.SLOTS, True

    def trainee(self, lesson: Lesson) -> Trainee:
        return Trainee(Ground(lesson.base, lesson.parent))

    def read(self, adapter: Raw, slots: Sequence[Slot], limit: int) -> Change:
        return read(adapter, slots, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: part for slot, moment in moments.items() for name, part in factors(slot, moment).items()}

    def adapter_of(
        self, updates: Mapping[str, Tensor], parent: Mapping[str, Tensor], rank: int, like: Change | None = None
    ) -> tuple[dict[str, Tensor], float]:
        return {slot: update.float() for slot, update in updates.items()}, 1.0
