"""Patch kinds: what a patch of that kind may change, how a model is run with it, and what its blobs hold. An extension
point.

A kind works on slots of one prefix. Kinds of the same prefix share their slots, and a version does not know by which of
them it came about: `fish`, `dense` and `lora` all change `weight:` slots.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from math import prod
from typing import Protocol

from torch import Tensor, nn

from p2pmodel.domain import modular
from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob, compact, dense, experts, fish, fourbit, ia3, lora, smear_hooks, weights
from p2pmodel.tensors.changes import Change, Factored, slot_places

GROUP = "p2pmodel.patch_kinds"


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

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        """All slots, sorted by name. `base` may be on the meta device."""

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """The state that changes nothing."""

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier: ...

    def read(self, adapter: bytes, slots: Sequence[Slot], limit: int) -> Change:
        """Of a blob that nobody vouches for, of slots of this kind, of `limit` bytes at most. Raises Rejected."""

    def read_fisher(self, change: Change, fisher: bytes, limit: int) -> Mapping[str, Tensor]:
        """By slot, float32 and not negative, or `changes.NOT_HELD`. Raises Rejected."""

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the Fisher blob is of, from values by a trainee's parameter that stand for a Fisher, such as the roots
        of Adam's second moments. Raises InvalidInput where they do not say enough."""


class _IA3:
    name, prefix, bytes_each = "ia3@1", ia3.PREFIX, 6

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        return ia3.find_slots(base)

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return ia3.initial(slots)

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier:
        return ia3.Applier(base, slots)

    def read(self, adapter: bytes, slots: Sequence[Slot], limit: int) -> Change:
        if fourbit.holds(adapter):
            places = slot_places(slots)
            return Change(fourbit.decode(adapter, places, limit), True, places)
        values = blob.unpack(adapter, slots, limit)
        if not values:
            raise Rejected("shape", "The patch changes nothing.")
        return Change(values, False, tuple((name, tuple(vector.shape)) for name, vector in sorted(values.items())))

    def read_fisher(self, change: Change, fisher: bytes, limit: int) -> Mapping[str, Tensor]:
        return compact.decode(fisher, change.fisher_places, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(moments)


class _Weights:
    """What the kinds that change weights have in common."""

    prefix = weights.PREFIX

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        return weights.find_slots(base)

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return weights.initial(slots)

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier:
        return weights.Applier(base, slots)


class _Fish(_Weights):
    name, bytes_each = "fish@1", 1

    def read(self, adapter: bytes, slots: Sequence[Slot], limit: int) -> Change:
        return fish.read(adapter, slots, limit)

    def read_fisher(self, change: Change, fisher: bytes, limit: int) -> Mapping[str, Tensor]:
        return fish.masses(change, compact.decode(fisher, change.fisher_places, limit))

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(moments)


class _Factored(_Weights):
    def read_fisher(self, change: Change, fisher: bytes, limit: int) -> Mapping[str, Tensor]:
        shapes = {slot: change.shape(slot) for slot in change.values}
        return Factored(shapes, compact.decode(fisher, change.fisher_places, limit))


class _Dense(_Factored):
    name, bytes_each = "dense@1", 6

    def read(self, adapter: bytes, slots: Sequence[Slot], limit: int) -> Change:
        return dense.read(adapter, slots, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dense.fisher_of(moments)


class _LoRA(_Factored):
    name, bytes_each = "lora@1", 1

    def read(self, adapter: bytes, slots: Sequence[Slot], limit: int) -> Change:
        return lora.read(adapter, slots, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise InvalidInput(
            "The second moments of LoRA's factors say nothing of its product's Fisher.",
            "Use --fisher-labels model or data.",
        )


class _Expert:
    """Its slots are pools, which say what experts a version may have; see `domain.modular`."""

    name, prefix, bytes_each = modular.KIND, modular.PREFIX, 6

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        return experts.find_pools(base)

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return {}

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier:
        return smear_hooks.Applier(base, slots)

    def read(self, adapter: bytes, slots: Sequence[Slot], limit: int) -> Change:
        return experts.read(adapter, slots, limit)

    def read_fisher(self, change: Change, fisher: bytes, limit: int) -> Mapping[str, Tensor]:
        return compact.decode(fisher, change.fisher_places, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return experts.fisher_of(moments)


_BUILT_IN: dict[str, PatchKind] = {kind.name: kind for kind in (_IA3(), _Fish(), _Dense(), _LoRA(), _Expert())}
BUILT_IN = tuple(_BUILT_IN)


def get_kind(name: str) -> PatchKind:
    """A built-in kind, or the object that an entry point of the group `p2pmodel.patch_kinds` names. Raises NotFound."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for entry in entry_points(group=GROUP, name=name):
        kind: PatchKind = entry.load()
        return kind
    raise NotFound(
        f"Patch kind {name[:64]!r} is not known here.",
        f"Install the package that provides it; built in are {', '.join(_BUILT_IN)}.",
    )


class Kinds:
    """All kinds of one lineage: its slots, and how a model is run at one of its states."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: such as those in a Manifest. Raises NotFound."""
        kinds = [get_kind(name) for name in names]
        self._by_prefix = {kind.prefix: kind for kind in kinds}

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        """Of all kinds, sorted by name. Raises InvalidInput when the model has none of one kind's."""
        found = [slot for kind in self._by_prefix.values() for slot in kind.find_slots(base)]
        return tuple(sorted(found, key=lambda slot: slot.name))

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for prefix, kind in self._by_prefix.items():
            state |= kind.initial([slot for slot in slots if slot.name.startswith(prefix)])
        return dict(sorted(state.items()))

    def applier(self, base: nn.Module, slots: Sequence[str]) -> Applier:
        # What exchanges weights comes first: hooks look at the modules that are there.
        parts = {
            prefix: kind.applier(base, [slot for slot in slots if slot.startswith(prefix)])
            for prefix, kind in sorted(self._by_prefix.items(), reverse=True)
        }
        return parts.popitem()[1] if len(parts) == 1 else _Appliers(parts)


@dataclass(frozen=True)
class _Appliers:
    """By the prefix of the slots of each."""

    parts: Mapping[str, Applier]

    @contextmanager
    def use(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        with ExitStack() as stack:
            for prefix, applier in self.parts.items():
                own = {name: tensor for name, tensor in (state or {}).items() if name.startswith(prefix)}
                stack.enter_context(applier.use(own))
            yield

    def remove(self) -> None:
        for applier in self.parts.values():
            applier.remove()


def largest_patch(names: Sequence[str], slots: Sequence[Slot]) -> int:
    """Bytes that a patch of any of these kinds may need. Raises NotFound."""
    kinds = [get_kind(name) for name in names]
    return max(sum(k.bytes_each * prod(s.shape) + 4096 for s in slots_of(k, slots)) for k in kinds)


def slots_of(kind: PatchKind, slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Those of a lineage that the kind's patches may change."""
    return tuple(slot for slot in slots if slot.name.startswith(kind.prefix))
