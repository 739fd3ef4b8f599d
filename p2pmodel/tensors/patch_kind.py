"""Patch kinds: what a patch of that kind may change, how a model is run with it, and what its blobs hold. An extension
point.

A kind works on slots of one prefix. Kinds of the same prefix share their slots, and a version does not know by which of
them it came about: `fish`, `dense` and `lora` all change `weight:` slots.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor, nn

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.model import Slot
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change


class Applier(Protocol):
    """Runs one module with the slots' tensors; one forward at a time."""

    def use(self, state: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        """Within: the module computes with `state`, by slot name. A tensor has the slot's shape, or that shape with a
        leading batch dimension for one value per row. Gradients flow into it. None or {}: the module as it is."""

    def remove(self) -> None:
        """Takes away all that the applier has put on the module."""


class Trainee(Protocol):
    """What is trained of one patch, on a model whose own parameters are frozen."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Leaves that an optimiser may change in place: float32, sorted by name, on the model's device."""

    def use(self) -> AbstractContextManager[None]:
        """Within: the model computes with them, and gradients flow into them. It nests."""

    def adapter(self) -> dict[str, Tensor]:
        """What the patch's adapter blob holds at this moment: float32 (and int32 indices) copies on the CPU."""

    def squared_gradients(self, losses: Callable[[slice], Tensor], rows: int) -> dict[str, Tensor]:
        """Sum over `rows` examples of the squared gradient of each alone: float64 on the CPU, by the names that the
        Fisher blob is of.

        losses(part) -> [len(part)]: the losses of those examples, by the model as `use` makes it; it is called within
        `use` and with gradients enabled. A kind whose parameters apply per row asks for all rows at once (each with its
        own copy), the others one by one.
        """

    def remove(self) -> None:
        """Takes away all that it has put on the model."""


MAX_SCALE = 1e4
"""That a product of LoRA's factors is scaled by."""


@dataclass(frozen=True)
class KindOptions:
    """density: share of the weights that a FISH mask chooses; mask_examples: how many examples the Fisher is of that it
    is chosen by. rank, alpha: of LoRA; the product of its factors is scaled by alpha / rank. expert: the name of the
    one that is trained, of that rank where it is new; router: train the rows of all experts instead, and no adapter."""

    density: float = 0.005
    mask_examples: int = 64
    rank: int = 8
    alpha: float = 16.0
    expert: str = ""
    router: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InvalidInput("The density is a share of the weights, between 0 and 1.", "Use 0.005 or 0.025.")
        if self.mask_examples < 1 or self.rank < 1 or not 0 < self.alpha / self.rank <= MAX_SCALE:
            raise InvalidInput("The mask's examples, the rank and alpha have to be positive, and alpha not too large.")


@dataclass(frozen=True)
class Lesson:
    """What a trainee is made for. model: the causal one, as transformers has it, on `device`; base: without its head.
    parent: the values of the kind's slots at the version that the patch is against. ids: [N, T] of the examples;
    losses: [k] of the examples of these indices, by the model as it is. at_parent: within, the model computes with the
    parent's slots of other kinds. seed: of whatever is drawn."""

    model: nn.Module
    base: nn.Module
    device: torch.device
    parent: Mapping[str, Tensor]
    ids: Tensor
    losses: Callable[[Tensor], Tensor]
    at_parent: Callable[[], AbstractContextManager[None]]
    options: KindOptions
    seed: int


class Fit(IntEnum):
    """How an update of slots, that others' patches made, fits into one patch of a kind."""

    NONE = 0
    """Not at all: its patches stay apart, and bring slots of their own."""
    PART = 1
    """As much of it as there is room for."""
    ANY = 2
    """Whole, whatever it is."""
    SLOTS = 3
    """Whole, and what is trained are the slots themselves: their updates can be sent in four bits a value, and
    contributors' gradients have a mean."""


class Runs(Protocol):
    """How a model is run at a state: one kind's, or all of a lineage's."""

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier: ...


class PatchKind(Protocol):
    """`base` is the transformer without its head (`model.base_model`); slot names hold paths below it."""

    @property
    def name(self) -> str: ...

    @property
    def prefix(self) -> str:
        """Of the names of its slots."""

    @property
    def bytes_each(self) -> int:
        """That a patch may need for each value of its slots: adapter, Fisher and control variate."""

    @property
    def fit(self) -> Fit: ...

    @property
    def relative(self) -> bool:
        """Whether an adapter blob in 32 bits holds updates, and not the values that come of them."""

    @property
    def continued(self) -> bool:
        """Whether what is trained means the same in the next round, so that moments and control variates go on."""

    @property
    def learning_rate(self) -> float:
        """Where nobody says: the more values are trained, the smaller."""

    @property
    def options(self) -> tuple[str, ...]:
        """Numbers of `KindOptions` that it asks for; sorted."""

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        """All slots, sorted by name. `base` may be on the meta device."""

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """The state that changes nothing."""

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier: ...

    def trainee(self, lesson: Lesson) -> Trainee:
        """Puts its hooks on the model at once. Raises InvalidInput."""

    def read(self, adapter: Raw, slots: Sequence[Slot], limit: int) -> Change:
        """Of a blob that nobody vouches for, of slots of this kind, of `limit` bytes at most. Raises Rejected."""

    def read_fisher(self, change: Change, fisher: Raw, limit: int) -> Mapping[str, Tensor]:
        """By slot, float32 and not negative, or `changes.NOT_HELD`. Raises Rejected."""

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the Fisher blob is of, from values by a trainee's parameter that stand for a Fisher, such as the roots
        of Adam's second moments. Raises InvalidInput where they do not say enough."""

    def adapter_of(
        self, updates: Mapping[str, Tensor], parent: Mapping[str, Tensor], rank: int, like: Change | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """(what the adapter blob holds of updates of the parent's slots, the share of them that it has room for). rank:
        of the updates of matrices, at most; like: what was trained, where these are what becomes of it elsewhere.
        Raises InvalidInput where the updates do not fit."""

    def reduced(self, slot: str, mass: Tensor, update: Tensor) -> dict[str, Tensor]:
        """What the Fisher blob is of, of a slot's Fisher [of the slot's shape] and its update, as `adapter_of` takes
        it."""
