"""Slots that belong to one session alone: a user's private patch, or what is being trained."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import MAX_ROWS, Span
from p2pmodel.engine.stage import Stage
from p2pmodel.engine.versions import expert_shape, slot_layer
from p2pmodel.tensors import ia3
from p2pmodel.tensors.blob import unpack
from p2pmodel.tensors.experts import check_values
from p2pmodel.tensors.smear import is_expert
from p2pmodel.wire.frames import MAX_BODY_BYTES


class SessionVectors:
    """Reads them, for one stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def read(self, body: Buffer, span: Span, *, by_row: bool) -> dict[str, Tensor]:
        """Of a blob of (IA)³ slots and those of modular experts, what is of layers of `span`, sorted by name, on the
        stage's device.

        A vector is [D], or with `by_row`, as for training, [B, D]; then no expert is taken. Raises Rejected("size" |
        "schema" | "slot" | "shape" | "finite").
        """
        own: dict[str, Tensor] = {}
        for name, tensor in unpack(body, None, MAX_BODY_BYTES).items():
            layer = slot_layer(name, self._stage.checkpoint.stack)
            expert = is_expert(name) and not by_row
            if not (expert or name.startswith((ia3.IN, ia3.OUT))) or layer is None:
                raise Rejected("slot", f"Only (IA)³ vectors of layers travel with a session, not {name[:128]!r}.")
            if layer not in span:
                continue
            if expert:
                own[name] = self._of_expert(name, tensor)
                continue
            if self._stage.is_elsewhere(name):
                raise Rejected(
                    "slot", f"Slot {name[:128]!r} is of experts on other peers, whom a session's vectors don't reach."
                )
            shape = self._shapes.get(name)
            alone = tensor.shape[1:] if by_row and tensor.ndim == 2 and len(tensor) <= MAX_ROWS else tensor.shape
            if shape is None or tuple(alone) != shape or not tensor.is_floating_point():
                raise Rejected("shape", f"The model has no place for slot {name[:128]!r} of {tuple(tensor.shape)}.")
            own[name] = tensor.to(self._stage.device).float()
        self._stage.prepare_slots(frozenset(own))
        return dict(sorted(own.items()))

    def _of_expert(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32 or expert_shape(self._stage, name, tensor) != tuple(tensor.shape):
            raise Rejected("shape", f"The model has no place for slot {name[:128]!r} of {tuple(tensor.shape)}.")
        check_values(name, tensor)
        return tensor.to(self._stage.device)

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._stage.slot_shapes()
