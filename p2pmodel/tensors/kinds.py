"""Patch kinds: what a patch of that kind may change, and how a model is run with it. An extension point."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Protocol

from torch import Tensor, nn

from p2pmodel.domain.errors import NotFound
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import ia3

GROUP = "p2pmodel.patch_kinds"


class Applier(Protocol):
    """Runs one module with the slots' tensors; one forward at a time."""

    def use(self, state: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        """Within: the module computes with `state`, by slot name. A tensor has the slot's shape, or that shape with a
        leading batch dimension for one value per row. Gradients flow into it. None or {}: the module as it is."""

    def remove(self) -> None:
        """Takes away all that the applier has put on the module."""


class PatchKind(Protocol):
    """`base` is the transformer without its head (`model.base_model`); slot names hold paths below it."""

    @property
    def name(self) -> str: ...

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        """All slots, sorted by name. `base` may be on the meta device."""

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """The state that changes nothing."""

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier: ...


class _IA3:
    name = "ia3@1"

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        return ia3.find_slots(base)

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return ia3.initial(slots)

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier:
        return ia3.Applier(base, slots)


_BUILT_IN: dict[str, PatchKind] = {"ia3@1": _IA3()}


def get_kind(name: str) -> PatchKind:
    """A built-in kind, or the object that an entry point of the group `p2pmodel.patch_kinds` names. Raises NotFound."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for entry in entry_points(group=GROUP, name=name):
        kind: PatchKind = entry.load()
        return kind
    raise NotFound(f"Patch kind {name[:64]!r} is not known here.", "Install the package that provides it.")
