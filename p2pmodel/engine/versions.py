"""The versions that a stage serves: the slot tensors of each, kept beside each other. A session keeps its own."""

import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.engine.stage import Stage
from p2pmodel.tensors import ia3

State = Mapping[str, Tensor]


class VersionTable:
    """Thread-safe. The base version's state is empty."""

    def __init__(self, stage: Stage) -> None:
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
        """Serves `version` from now on: slot name -> [D]. Of `state`, the slots of the stage's span are copied.

        Raises Rejected("slot" | "finite") for a slot that the model does not have in that shape, or that is not finite.
        """
        if self._shapes is None and state:
            self._shapes = {slot.name: slot.shape for slot in ia3.find_slots(self._stage.base)}
        hosted = {name: self._checked(name, tensor) for name, tensor in state.items() if self._is_hosted(name)}
        self._stage.prepare_slots(frozenset(hosted))
        with self._lock:
            self._states[version] = MappingProxyType(hosted)

    def get(self, version: VersionId) -> State:
        """The slots of the hosted span, on the stage's device. Raises NotFound."""
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
        layer = slot_layer(name, self._stage.checkpoint.stack)
        return layer is not None and layer in self._stage.span

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or (self._shapes or {}).get(name) != tuple(tensor.shape):
            raise Rejected("slot", f"The model has no place for slot {name[:128]!r} of shape {tuple(tensor.shape)}.")
        if not bool(tensor.isfinite().all()):
            raise Rejected("finite", f"Slot {name[:128]!r} is not finite.")
        return tensor.detach().to(self._stage.device, copy=True)


def stack_states(states: Sequence[State], rows: Sequence[int]) -> State:
    """One state for a batch: the vectors [D] where all are the same, else by row [B, D], with ones where a state has
    no vector. rows: how many rows of the batch each state is for."""
    if all(state is states[0] for state in states):
        return states[0]
    stacked = {}
    for name in {name for state in states for name in state}:
        some = next(state[name] for state in states if name in state)
        vectors = [state.get(name, torch.ones_like(some)) for state in states]
        stacked[name] = torch.stack(vectors).repeat_interleave(torch.tensor(rows, device=some.device), dim=0)
    return stacked


def slot_layer(name: str, stack: str) -> int | None:
    """Of `KIND:PATH`, where PATH is below the base model: the layer, or None for a slot that is in no layer."""
    path = name[name.rfind(":") + 1 :]
    number, _, place = path.removeprefix(f"{stack}.").partition(".")
    return int(number) if path.startswith(f"{stack}.") and place and number.isdecimal() else None
