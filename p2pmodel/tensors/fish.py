"""FISH masks (Sung et al., 2021, arXiv:2111.09839): the few weights with the largest Fisher, fixed over training.

One global top-k over all slots, by the Fisher with the labels of the data; with labels sampled from the model a mask of
0.5 % is no better than a random one. The optimiser holds the chosen values and nothing else, so whatever it does, decay
included, what is outside of the mask stays as it is.

The blob holds for every slot with chosen values `SLOT#index`, int32 [k], rising, into the flat tensor, and
`SLOT#value`, float32 [k]: their updates against the parent.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import NOT_HELD, Change, Sparse
from p2pmodel.tensors.patch_kind import Fit, Lesson
from p2pmodel.tensors.weights import Ground, WeightKind, WeightTrainee, leaf

INDEX, VALUE = "#index", "#value"


def choose(fisher: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """By slot, the flat indices [k] int64, rising, of the share `density` of all values with the largest Fisher; of
    equal ones the first, in the order of the slots' names. Slots without any are left out; values without mass are
    never chosen."""
    names = sorted(fisher)
    flat = torch.cat([fisher[name].detach().reshape(-1) for name in names])
    wanted = max(1, round(density * len(flat)))
    threshold = flat.kthvalue(len(flat) - wanted + 1).values
    chosen = flat > threshold
    if threshold > 0:
        ties = (flat == threshold).nonzero().view(-1)
        chosen[ties[: wanted - int(chosen.sum())]] = True
    parts = torch.split(chosen, [fisher[name].numel() for name in names])
    indices = {name: part.nonzero().view(-1) for name, part in zip(names, parts, strict=True)}
    return {name: index for name, index in indices.items() if len(index)}


class Trainee(WeightTrainee):
    """Its parameters are the updates of the chosen values."""

    def __init__(self, ground: Ground, mask: Mapping[str, Tensor]) -> None:
        """mask: as `choose` gives it."""
        super().__init__(ground)
        self._mask = {slot: index.to(ground.weights[slot].device) for slot, index in sorted(mask.items())}
        self.parameters = {
            slot + VALUE: leaf(torch.zeros(len(index), device=index.device)) for slot, index in self._mask.items()
        }

    def weights(self) -> dict[str, Tensor]:
        return {
            slot: self._ground.weights[slot].flatten().index_add(0, index, self.parameters[slot + VALUE]).view(shape)
            for slot, index in self._mask.items()
            for shape in [self._ground.weights[slot].shape]
        }

    def adapter(self) -> dict[str, Tensor]:
        held = {slot + INDEX: index.to("cpu", torch.int32) for slot, index in self._mask.items()}
        return held | {name: value.detach().to("cpu", copy=True) for name, value in self.parameters.items()}

    def reduced(self, slot: str, squares: Tensor) -> dict[str, Tensor]:
        return {slot + VALUE: squares.flatten()[self._mask[slot]]}


def read(raw: Raw, slots: Sequence[Slot], limit: int) -> Change:
    """Raises Rejected. What it takes is in proportion to `raw`, whatever that claims."""
    tensors = blob.unpack(raw, None, limit)
    known = {slot.name: slot for slot in slots}
    indices: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        slot, _, part = name.rpartition("#")
        if slot not in known or f"#{part}" not in (INDEX, VALUE) or tensor.ndim != 1:
            raise Rejected("schema", f"{name[:64]!r} is nothing that a FISH patch of this model holds.")
        if tensor.dtype != (torch.int32 if f"#{part}" == INDEX else torch.float32):
            raise Rejected("shape", f"{name[:64]!r} of the patch is {tensor.dtype}.")
        (indices if f"#{part}" == INDEX else values)[slot] = tensor
    if not values or indices.keys() != values.keys():
        raise Rejected("shape", "A FISH patch needs an index and a value of each slot, and one slot at least.")
    for slot, index in indices.items():
        size = prod(known[slot].shape)
        rises = bool((index[1:] > index[:-1]).all())
        if not len(index) or len(index) != len(values[slot]) or not rises or index[0] < 0 or index[-1] >= size:
            raise Rejected("shape", f"The indices of {slot[:64]!r} do not rise within its {size} values, one each.")
    shapes = {slot: known[slot].shape for slot in indices}
    places = tuple(sorted((slot + VALUE, tuple(value.shape)) for slot, value in values.items()))
    return Change(Sparse(shapes, indices, tensors, VALUE, 0.0), True, places)


def masses(change: Change, fisher: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """fisher: {slot#value: [k]}. -> by slot, with NOT_HELD outside of the mask."""
    assert isinstance(change.values, Sparse)
    return change.values.alike(fisher, NOT_HELD)


class Kind(WeightKind):
    """See `patch_kind.PatchKind`."""

    name, bytes_each, learning_rate = "fish@1", 1, 2e-3
    options = ("density", "mask_examples")
    fit, continued = Fit.ANY, True

    def trainee(self, lesson: Lesson) -> Trainee:
        ground, generator = Ground(lesson.base, lesson.parent), torch.Generator().manual_seed(lesson.seed)
        drawn = torch.randperm(len(lesson.ids), generator=generator)[: lesson.options.mask_examples]
        fisher = {slot: torch.zeros_like(weight) for slot, weight in ground.weights.items()}
        with lesson.at_parent():
            for gradients in ground.gradients(ground.weights, lambda part: lesson.losses(drawn[part]), len(drawn)):
                for slot in fisher:
                    fisher[slot] += gradients.pop(slot).square()
        return Trainee(ground, choose(fisher, lesson.options.density))

    def read(self, adapter: Raw, slots: Sequence[Slot], limit: int) -> Change:
        return read(adapter, slots, limit)

    def read_fisher(self, change: Change, fisher: Raw, limit: int) -> Mapping[str, Tensor]:
        return masses(change, compact.Decoded(fisher, change.fisher_places, limit))

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(moments)

    def adapter_of(
        self, updates: Mapping[str, Tensor], parent: Mapping[str, Tensor], rank: int, like: Change | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """The mask is that of what was trained, or of all that is not zero."""
        flat = {slot: update.reshape(-1) for slot, update in updates.items()}
        if like is None:
            places = {slot: update.nonzero().view(-1) for slot, update in flat.items()}
            indices = {slot: index.to(torch.int32) for slot, index in places.items() if len(index)}
        else:
            assert isinstance(like.values, Sparse)
            indices = {slot: like.values.indices[slot] for slot in flat}
        values = {slot + VALUE: flat[slot][index.long()].float() for slot, index in indices.items()}
        return {slot + INDEX: index for slot, index in indices.items()} | values, 1.0

    def reduced(self, slot: str, mass: Tensor, update: Tensor) -> dict[str, Tensor]:
        index = update.reshape(-1).nonzero().view(-1)
        return {slot + VALUE: mass.reshape(-1)[index]} if len(index) else {}
