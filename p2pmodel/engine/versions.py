"""The versions that a stage serves, kept beside each other. A session keeps its own to its end.

What is by row, (IA)³ vectors and modular experts, is kept as it is: rows of one forward may differ. Weights are folded
once when a version comes, on the thread that brings it, and a forward of that version is given them in place of the
checkpoint's own: to change over is to set pointers. Weights that a version leaves alone, or shares with another
version, are the same tensors. At most MAX_FOLDED versions with weights of their own are kept, besides those that open
sessions still use.
"""

import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.domain.modular import DOWN, MAX_RANK, UP, Expert, place_of, pool_slot, slots_of_expert
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.tensors import weights
from p2pmodel.tensors.smear import is_expert

State = Mapping[str, Tensor]

MAX_FOLDED = 2


class Host(Protocol):
    """Where the parts of a model are that versions change: a stage, or a shard of experts."""

    checkpoint: Checkpoint
    span: Span
    device: torch.device

    def prepare_slots(self, names: frozenset[str]) -> None: ...

    def prepare_weights(self, names: frozenset[str]) -> Mapping[str, Tensor]: ...

    def slot_shapes(self) -> dict[str, tuple[int, ...]]: ...

    def is_elsewhere(self, name: str) -> bool:
        """Whether a slot of one of the span's layers is of a part that is not hosted here."""


class VersionTable:
    """Thread-safe, but for `put`, which one thread calls at a time. The state of a version that changes nothing of
    the checkpoint is empty."""

    def __init__(self, stage: Host) -> None:
        self._stage = stage
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._states: dict[VersionId, State] = {}
        self._lock = threading.Lock()

    @property
    def versions(self) -> tuple[VersionId, ...]:
        """In the order in which they came."""
        with self._lock:
            return tuple(self._states)

    def put(self, version: VersionId, state: State) -> None:
        """Serves `version` from now on: vectors [D] and sums of updates of weights, by slot name. What is of the
        stage's span is copied or folded.

        Raises Rejected("slot" | "finite") for a slot that the model does not have in that shape, or that is not finite;
        InvalidInput when the stage's weights are quantised and the version changes them.
        """
        hosted = {name: tensor for name, tensor in state.items() if self._is_hosted(name)}
        updates = {name: tensor for name, tensor in hosted.items() if name.startswith(weights.PREFIX)}
        vectors = {name: tensor for name, tensor in hosted.items() if name not in updates}
        own = {name: self._vector(name, tensor) for name, tensor in vectors.items()}
        own |= self._folded(updates)
        self._stage.prepare_slots(frozenset(vectors))
        with self._lock:
            self._states[version] = MappingProxyType(own)

    def get(self, version: VersionId) -> State:
        """What differs from the base in the hosted span, on the stage's device: vectors [D], and whole weights in the
        stage's dtype. Raises NotFound."""
        with self._lock:
            state = self._states.get(version)
        if state is None:
            raise NotFound(f"Version {short(version)} is not served here.")
        return state

    def drop(self, version: VersionId) -> None:
        """No new session gets it; those that have it keep it. Dropping what is not there changes nothing."""
        with self._lock:
            self._states.pop(version, None)

    def _is_hosted(self, name: str) -> bool:
        if self._stage.is_elsewhere(name):
            return False
        layer = slot_layer(name, self._stage.checkpoint.stack)
        return layer is not None and layer in self._stage.span

    def _vector(self, name: str, tensor: Tensor) -> Tensor:
        if is_expert(name):
            _check(name, tensor, expert_shape(self._stage, name, tensor))
            return tensor.detach().to(self._stage.device, copy=True)
        if self._shapes is None:
            self._shapes = self._stage.slot_shapes()
        _check(name, tensor, self._shapes.get(name))
        return tensor.detach().to(self._stage.device, copy=True)

    def _folded(self, updates: State) -> dict[str, Tensor]:
        """The weights that are not the checkpoint's own."""
        changed = {name: update for name, update in updates.items() if bool(update.any())}
        if not changed:
            return {}
        originals = self._stage.prepare_weights(frozenset(changed))
        if not all(weight.is_floating_point() for weight in originals.values()):
            raise InvalidInput(
                "A version that changes weights can't be served from quantised ones.", "Use --dtype bf16."
            )
        for name, update in changed.items():
            original = originals.get(name)
            _check(name, update, None if original is None else tuple(original.shape))
        self._make_room()
        others = [state for state in map(self.get, self.versions) if has_weights(state)]
        folded: dict[str, Tensor] = {}
        for name, update in changed.items():
            weight = weights.folded(originals[name], update.detach())
            known = (state[name] for state in others if name in state)
            same = next((tensor for tensor in known if torch.equal(tensor, weight)), None)
            folded[name] = nn.Parameter(weight, requires_grad=False) if same is None else same
        return folded

    def _make_room(self) -> None:
        """The oldest give way before another one is folded."""
        with self._lock:
            folded = [version for version, state in self._states.items() if has_weights(state)]
            for version in folded[: len(folded) - (MAX_FOLDED - 1)]:
                del self._states[version]


def expert_shape(stage: Host, name: str, tensor: Tensor) -> tuple[int, ...] | None:
    """Of the slot of a modular expert whose rank is that of `tensor`; None where the model has no place for one."""
    place = place_of(name)
    if place is None or place.layer.rpartition(".")[0] != stage.checkpoint.stack or not tensor.ndim:
        return None
    pool = pool_slot(place.layer, stage.checkpoint.hidden_size)
    rank = tensor.shape[0] if place.part in (DOWN, UP) else 1
    if not 1 <= rank <= MAX_RANK:
        return None
    return next(s.shape for s in slots_of_expert([pool], Expert(place.expert, rank)) if s.name == name)


def has_weights(state: State) -> bool:
    return any(name.startswith(weights.PREFIX) for name in state)


def weights_key(state: State) -> tuple[int, ...]:
    """Sessions whose states have the same one compute with the same weights, as long as these states are there."""
    return tuple(id(tensor) for name, tensor in state.items() if name.startswith(weights.PREFIX))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
    if not tensor.is_floating_point() or shape != tuple(tensor.shape):
        raise Rejected("slot", f"The model has no place for slot {name[:128]!r} of shape {tuple(tensor.shape)}.")
    if not bool(tensor.isfinite().all()):
        raise Rejected("finite", f"Slot {name[:128]!r} is not finite.")


def stack_states(states: Sequence[State], rows: Sequence[int]) -> State:
    """One state for a batch of sessions with the same weights, without experts, which a session's cache knows: the
    vectors [D] where all are the same, else by row
    [B, D], with ones where a state has no vector. rows: how many rows of the batch each state is for."""
    if all(state is states[0] for state in states):
        return states[0]
    stacked = {name: tensor for name, tensor in states[0].items() if name.startswith(weights.PREFIX)}
    for name in {name for state in states for name in state if name not in stacked and not is_expert(name)}:
        some = next(state[name] for state in states if name in state)
        vectors = [state.get(name, torch.ones_like(some)) for state in states]
        stacked[name] = torch.stack(vectors).repeat_interleave(torch.tensor(rows, device=some.device), dim=0)
    return stacked


def slot_layer(name: str, stack: str) -> int | None:
    """Of `KIND:PATH`, where PATH is below the base model: the layer, or None for a slot that is in no layer."""
    path = name[name.rfind(":") + 1 :]
    number, _, place = path.removeprefix(f"{stack}.").partition(".")
    return int(number) if path.startswith(f"{stack}.") and place and number.isdecimal() else None
