"""Some experts of some layers, and nothing else of the model: what an expert host computes with."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.experts import describe
from p2pmodel.domain.swarm import Span
from p2pmodel.engine import family
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.expert_calls import Pairs
from p2pmodel.engine.expert_layout import ExpertLayout, find_experts, shrink, skeleton
from p2pmodel.tensors import ia3, weights
from p2pmodel.tensors.smear import is_expert

PAIRS_AT_ONCE = 1024
"""More are computed in parts, so that what is between the experts' two projections keeps a bound."""


def load_experts(
    checkpoint: Checkpoint,
    span: Span,
    experts: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> "ExpertShard":
    """Reads the tensors of these experts in the layers of `span` that have any: single ones where each expert has its
    own, and parts of those that are stacked. Raises InvalidInput when the model lacks them, or its family does not let
    experts be hosted apart."""
    layout = ExpertLayout(checkpoint)
    if span.end > checkpoint.layers:
        raise InvalidInput(f"The model has {checkpoint.layers} layers, so it has no span {span}.")
    counts = layout.counts_in(span)
    fewest = min(counts.values())
    if experts[-1] >= fewest:
        raise InvalidInput(
            f"There is no expert {experts[-1]}: the layers {span} have {fewest}.",
            f"Use at most --experts 0-{fewest - 1}.",
        )
    wanted = layout.of_shard(span, experts)
    checkpoint.provide(checkpoint.files_with(wanted.__contains__))
    scratch = family.Scratch()

    def cut(base: PreTrainedModel) -> None:
        layers: Any = base.get_submodule(checkpoint.stack)
        places = find_experts(base, checkpoint.stack)
        for index, layer in enumerate(layers):
            if index in span and index in places:
                path = places[index].removeprefix(f"{checkpoint.stack}.{index}.")
                shrink(layer.get_submodule(path), len(experts))
                layers[index] = skeleton(layer, path)
            else:
                layers[index] = nn.Module()
        family.hide_others(base, checkpoint.stack, scratch)

    def read(name: str, tensor: Any) -> Any:
        place = wanted[name]
        return _part(name, tensor, experts, counts[place.layer]) if place.stacked else tensor

    base = family.load_parts(
        checkpoint.base_class(),
        checkpoint.config,
        checkpoint.path,
        dtype,
        device,
        cut,
        wanted=wanted.__contains__,
        tied=False,
        read=read,
    )
    base.requires_grad_(False)
    shard = ExpertShard(base, checkpoint, span, experts, dtype, counts)
    for layer in counts:  # touches every page, and finds out whether the family's module takes what the interface says
        shard.try_out(layer)
    return shard


class ExpertShard:
    """Shapes: R rows, P pairs of a row and an expert, H the width of the model. Thread-safe: one computation runs at a
    time. counts: layer -> how many experts it has in the model, of the layers of `span` that have any."""

    def __init__(
        self,
        base: PreTrainedModel,
        checkpoint: Checkpoint,
        span: Span,
        experts: Sequence[int],
        dtype: torch.dtype,
        counts: Mapping[int, int],
    ) -> None:
        self.base = base
        self.checkpoint = checkpoint
        self.span = span
        self.experts = tuple(experts)
        self.dtype = dtype
        self.device = base.device
        self.width = checkpoint.hidden_size
        self.counts = dict(counts)
        self.paths = find_experts(base, checkpoint.stack)
        self._modules = {layer: base.get_submodule(path) for layer, path in self.paths.items()}
        self._places = torch.full((max(counts.values()),), -1)
        self._places[list(self.experts)] = torch.arange(len(self.experts))
        self._lock = threading.RLock()
        self._applier = ia3.Applier(base, ())
        self._slots: frozenset[str] = frozenset()
        self._weights = weights.Places(base, ())

    @property
    def weight_bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in (*self.base.parameters(), *self.base.buffers()))

    def slot_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Stage.slot_shapes`."""
        with self._lock:
            return {slot.name: slot.shape for slot in ia3.find_slots(self.base)}

    def prepare_slots(self, names: frozenset[str]) -> None:
        """As `Stage.prepare_slots`."""
        with self._lock:
            if not names <= self._slots:
                self._applier.remove()
                self._slots |= names
                self._applier = ia3.Applier(self.base, sorted(self._slots))

    def prepare_weights(self, names: frozenset[str]) -> Mapping[str, Tensor]:
        """As `Stage.prepare_weights`."""
        with self._lock:
            self._weights.put({})
            self._weights = weights.Places(self.base, sorted(names | self._weights.originals.keys()))
            return {name: weight for name, weight in self._weights.originals.items() if name in names}

    def is_elsewhere(self, name: str) -> bool:
        """As `Stage.is_elsewhere`."""
        path = name[name.rfind(":") + 1 :]
        return is_expert(name) or not any(path.startswith(f"{owner}.") for owner in self.paths.values())

    def own_part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a version's state, the slots of experts in the hosted layers; of stacked weights the hosted experts."""
        layers = {path: layer for layer, path in self.paths.items()}
        own: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if not self.is_elsewhere(name):
                layer = layers.get(name.removeprefix(weights.PREFIX).rpartition(".")[0])
                stacked = layer is not None and len(tensor) == self.counts[layer]
                own[name] = tensor[list(self.experts)] if stacked else tensor
        return own

    def compute(self, layer: int, rows: Tensor, pairs: Pairs, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """rows [R, H] -> [R, H] float32: for each row the sum over its pairs of gate times what the expert makes of it.

        state: slot state of the version. Raises NotFound for a layer or an expert that is not hosted.
        """
        hosted = self._find(layer, pairs)
        device = self.device
        rows = rows.to(device, self.dtype)
        out = torch.zeros(rows.shape, dtype=torch.float32, device=device)
        with self._lock:
            self._weights.put(state or {})
            with self._applier.use(state):
                for start in range(0, len(pairs), PAIRS_AT_ONCE):
                    part = slice(start, start + PAIRS_AT_ONCE)
                    # Every pair is a row of its own with one expert, so the family's module needs no placeholders.
                    chosen = rows[pairs.row[part].to(device)]
                    gates = pairs.gate[part].to(device).unsqueeze(1)
                    made = self._modules[layer](chosen, hosted[part].to(device).unsqueeze(1), gates)
                    out = out.index_add(0, pairs.row[part].to(device), made.float())
        return out

    def gradients(
        self, layer: int, rows: Tensor, pairs: Pairs, outer: Tensor, state: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of rows [R, H] and gates [P], float32, from those of `compute`'s answer [R, H]. It computes once more, so
        that nothing has to be kept between the two ways. Raises NotFound."""
        leaf = rows.detach().to(self.device, torch.float32, copy=True).requires_grad_(True)
        outer = outer.to(self.device, torch.float32)
        of_rows, of_gates = torch.zeros_like(leaf, requires_grad=False), torch.zeros(len(pairs))
        for start in range(0, len(pairs), PAIRS_AT_ONCE):  # a graph for each part
            part = slice(start, start + PAIRS_AT_ONCE)
            with torch.enable_grad():
                gates = pairs.gate[part].detach().clone().requires_grad_(True)
                out = self.compute(layer, leaf, Pairs(pairs.row[part], pairs.expert[part], gates), state)
                more, of_gates[part] = torch.autograd.grad(out, (leaf, gates), outer)
            of_rows += more
        return of_rows, of_gates

    @torch.inference_mode()
    def try_out(self, layer: int) -> None:
        """Raises InvalidInput when the family's module does not do what the interface says."""
        every = torch.tensor(self.experts)
        rows = torch.randn(2, self.width, generator=torch.Generator().manual_seed(0))
        row = torch.cat([torch.zeros_like(every), torch.ones_like(every)])
        pairs = Pairs(row, every.repeat(2), torch.ones(len(row)))
        try:
            self.compute(layer, rows, pairs)
        except family.FAMILY_ERRORS as error:
            raise InvalidInput(
                f"Experts of type {self.checkpoint.architecture} can't be hosted apart: {family.first_line(error)}."
            ) from None

    def has(self, layer: int, pairs: Pairs) -> bool:
        """Whether it hosts all of them."""
        known = pairs.expert < len(self._places)
        return layer in self.counts and bool(known.all()) and int(self._places[pairs.expert].min()) >= 0

    def check(self, layer: int, pairs: Pairs) -> None:
        """Raises NotFound for a layer or an expert that is not hosted."""
        self._find(layer, pairs)

    def _find(self, layer: int, pairs: Pairs) -> Tensor:
        """[P], each expert's place among those that are hosted."""
        if layer not in self.counts:
            raise NotFound(f"This peer hosts no experts of layer {layer}.")
        if not self.has(layer, pairs):
            raise NotFound(f"This peer hosts experts {describe(self.experts)} of layer {layer}, and others were asked.")
        return self._places[pairs.expert]


def _part(name: str, tensor: Any, experts: Sequence[int], count: int) -> Tensor:
    """The hosted experts of a stacked tensor; no other bytes are read."""
    shape = tensor.get_shape()
    if not shape or shape[0] != count:
        raise InvalidInput(f"The tensor {name[:128]} of shape {list(shape)} does not hold {count} experts one by one.")
    runs: list[list[int]] = []
    for expert in experts:
        if runs and expert == runs[-1][1]:
            runs[-1][1] = expert + 1
        else:
            runs.append([expert, expert + 1])
    parts: list[Tensor] = [tensor[start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
