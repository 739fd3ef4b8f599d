"""Weights as slots: what the kinds that change weights have in common.

A slot `weight:PATH` is a parameter of a decoder layer, by its path below the base model; its value in a version is the
sum of all updates since the base, so zeros are the base itself. Embeddings, final norm and head have no slots: they are
each client's own part, which a new version does not reach. Parameters that layers share have none either: their layers
may be on different machines.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import compact
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change, Factored, factors
from p2pmodel.tensors.ia3 import layers_path

PREFIX = "weight:"
MAX_ELEMENTS = 2**31 - 1
"""Of one slot, so that an index fits an int32."""


def find_slots(base: nn.Module) -> tuple[Slot, ...]:
    """Sorted by name, float32. Raises InvalidInput when the model has no layers with weights of their own."""
    prefix = layers_path(base)
    named = list(base.named_parameters(remove_duplicate=False))
    uses: dict[int, int] = {}
    for _, parameter in named:
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    slots = [
        Slot(PREFIX + path, tuple(parameter.shape), "float32")
        for path, parameter in sorted(named)
        if path.startswith(prefix)
        and uses[id(parameter)] == 1
        and parameter.is_floating_point()
        and 0 < parameter.numel() <= MAX_ELEMENTS
    ]
    if not slots:
        raise InvalidInput("No layers with weights of their own were found in this model.")
    return tuple(slots)


def initial(slots: Sequence[Slot]) -> dict[str, Tensor]:
    """Zeros: the base's own weights."""
    return {slot.name: torch.zeros(slot.shape, dtype=torch.float32) for slot in slots}


def folded(weight: Tensor, update: Tensor) -> Tensor:
    """weight + update, summed in float32 and rounded once to the weight's dtype. Where the update is zero it is the
    weight's own bits, unless a gradient is to flow."""
    total = (weight.float() + update.to(weight.device, torch.float32)).to(weight.dtype)
    return total if update.requires_grad else torch.where(update.to(weight.device) == 0, weight, total)


class Places:
    """Where the modules of `base` keep the weights that `slots` name. To exchange a weight is to set a pointer; slots
    of modules that are not there are left out."""

    def __init__(self, base: nn.Module, slots: Sequence[str]) -> None:
        self.originals: dict[str, Tensor] = {}
        self._owners: dict[str, tuple[dict[str, Any], str]] = {}
        for slot in slots:
            path, _, leaf = slot.removeprefix(PREFIX).rpartition(".")
            try:
                owner: dict[str, Any] = base.get_submodule(path)._parameters
            except AttributeError:
                continue
            if owner.get(leaf) is not None:
                self._owners[slot], self.originals[slot] = (owner, leaf), owner[leaf]

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """From now on the modules compute with these, and where one is missing with their own."""
        for slot, (owner, leaf) in self._owners.items():
            wanted = weights.get(slot)
            if wanted is None:
                wanted = self.originals[slot]
            if owner[leaf] is not wanted:
                owner[leaf] = wanted


class Applier:
    """See `patch_kind.Applier`: the state is the sum of the updates since the base, the same for every row."""

    def __init__(self, base: nn.Module, slots: Sequence[str]) -> None:
        self._places = Places(base, slots)
        self._used: dict[str, Tensor] = {}
        self._folded: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def use(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """state: of the slots' shapes. Raises ValueError for one value per row."""
        before = self._used
        self._used = {
            slot: self._fold(slot, weight, state[slot])
            for slot, weight in self._places.originals.items()
            if state and slot in state
        }
        self._places.put(self._used)
        try:
            yield
        finally:
            self._used = before
            self._places.put(before)

    def remove(self) -> None:
        self._places.put({})
        self._folded.clear()

    def _fold(self, slot: str, weight: Tensor, update: Tensor) -> Tensor:
        if update.shape != weight.shape:
            raise ValueError(f"{slot} takes one value for all rows, of shape {tuple(weight.shape)}")
        if update.requires_grad:
            return folded(weight, update)
        known = self._folded.get(slot)
        if known is None or known[0] is not update:
            known = self._folded[slot] = update, folded(weight, update) if bool(update.any()) else weight
        return known[1]


class Ground:
    """A model at the weights of a version, of which some are replaced by what is trained."""

    def __init__(self, base: nn.Module, parent: Mapping[str, Tensor]) -> None:
        self._places = Places(base, list(parent))
        with torch.no_grad():
            self.weights = {
                slot: folded(weight.float(), parent[slot]).detach() for slot, weight in self._places.originals.items()
            }
        self._depth = 0

    @contextmanager
    def use(self, weights: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
        """weights: float32, of some slots. It nests: the outermost counts."""
        self._depth += 1
        try:
            if self._depth == 1:
                used = {**self.weights, **weights()}
                self._places.put({s: t.to(self._places.originals[s].dtype) for s, t in used.items()})
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._places.put({})

    def gradients(
        self, weights: Mapping[str, Tensor], losses: Callable[[slice], Tensor], rows: int
    ) -> Iterator[dict[str, Tensor]]:
        """Of every example alone, with respect to these weights: one forward and one backward pass each."""
        leaves = {slot: tensor.detach().requires_grad_(True) for slot, tensor in weights.items()}
        for row in range(rows):
            with torch.enable_grad(), self.use(lambda: leaves):
                loss = losses(slice(row, row + 1)).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            yield dict(zip(leaves, grads, strict=True))

    def remove(self) -> None:
        self._places.put({})


class WeightTrainee(ABC):
    """Base of the trainees of the kinds that change weights. See `patch_kind.Trainee`."""

    parameters: Mapping[str, Tensor]

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The weights that it changes, float32, as they are with the parameters of this moment."""

    @abstractmethod
    def adapter(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def reduced(self, slot: str, squares: Tensor) -> dict[str, Tensor]:
        """What the Fisher blob keeps of the squared gradient of a whole weight."""

    def use(self) -> AbstractContextManager[None]:
        return self._ground.use(self.weights)

    def squared_gradients(self, losses: Callable[[slice], Tensor], rows: int) -> dict[str, Tensor]:
        with torch.no_grad():
            weights = self.weights()
        sums: dict[str, Tensor] = {}
        for gradients in self._ground.gradients(weights, losses, rows):
            for slot in weights:
                for name, part in self.reduced(slot, gradients.pop(slot).double().square()).items():
                    sums[name] = part.cpu() if name not in sums else sums[name] + part.cpu()
        return sums

    def remove(self) -> None:
        self._ground.remove()


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(True)


class WeightKind:
    """Base of the kinds that change weights. See `patch_kind.PatchKind`."""

    prefix, relative = PREFIX, True

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        return find_slots(base)

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return initial(slots)

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier:
        return Applier(base, slots)


class FactoredKind(WeightKind):
    """Of those whose Fisher is kept as means of rows and columns."""

    def read_fisher(self, change: Change, fisher: Raw, limit: int) -> Mapping[str, Tensor]:
        shapes = {slot: change.shape(slot) for slot in change.values}
        return Factored(shapes, compact.Decoded(fisher, change.fisher_places, limit))

    def reduced(self, slot: str, mass: Tensor, update: Tensor) -> dict[str, Tensor]:
        return factors(slot, mass)
