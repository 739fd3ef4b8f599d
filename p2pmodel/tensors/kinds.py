"""The patch kinds that are here, built in and installed, and how a model is run with those of a lineage."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from math import prod

from torch import Tensor, nn

from p2pmodel.domain.errors import NotFound
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import dense, experts, fish, ia3, lora
from p2pmodel.tensors.patch_kind import Applier, PatchKind

GROUP = "p2pmodel.patch_kinds"


_BUILT_IN: dict[str, PatchKind] = {
    kind.name: kind for kind in (ia3.Kind(), fish.Kind(), dense.Kind(), lora.Kind(), experts.Kind())
}
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


def kinds_of(slots: Iterable[str]) -> "Kinds":
    """Those by which a model is run at these slots: whatever kinds there are of one prefix run it alike."""
    left, names = set(slots), []
    for kind in _installed():
        if own := {slot for slot in left if slot.startswith(kind.prefix)}:
            names.append(kind.name)
            left -= own
        if not left:
            break
    return Kinds(names)


def _installed() -> Iterator[PatchKind]:
    """Other packages are loaded when they are asked for."""
    yield from _BUILT_IN.values()
    for entry in entry_points(group=GROUP):
        yield entry.load()


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
