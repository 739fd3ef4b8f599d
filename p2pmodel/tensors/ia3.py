"""(IA)³ (Liu et al., 2022, arXiv:2205.05638): learned vectors that scale keys, values and the FFN's inner activations.

Slots are found by the names that Hugging Face's families use, below the model's list of layers:

- separate projections (`k_proj`, `v_proj`, `key`, `value`, …): one vector each on the output;
- projections fused with the query (`query_key_value`, `c_attn`, `qkv_proj`, `Wqkv`): one vector on the whole output, as
  PEFT does for GPT-2 and BLOOM. The layouts differ (by head, by group, side by side), and scaling a query adds nothing
  that scaling its key cannot say, but for what rotary embeddings mix;
- multi-head latent attention: the output of `kv_b_proj`, which holds the keys and the values of all heads;
- the FFN's down projection (`down_proj`, `fc2`, `c_proj`, BERT's `output.dense`, …): one vector on its input;
- mixtures of experts with stacked weights: one vector on the input of `experts.down_proj`, shared by the layer's
  experts. Experts that are a list of modules have no slot.

Cross-attention, routers, state-space layers and encoders beside the decoder have none either.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob, compact, fourbit, patch_kind
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change, laid_out, slot_places
from p2pmodel.tensors.patch_kind import Fit, Lesson

PREFIX, OUT, IN = "ia3:", "ia3:out:", "ia3:in:"

_KEYS_VALUES = {
    "k_proj",
    "v_proj",
    "key",
    "value",
    "key_proj",
    "value_proj",
    "k_lin",
    "v_lin",
    "project_k",
    "project_v",
    "Wk",
    "Wv",
    "kv_proj",
    "kv_b_proj",
    "v_proj_current",
    "v_proj_delayed",
}
_FUSED = {"query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj_qkv"}
_DOWN = {
    "down_proj",
    "fc2",
    "c_proj",
    "dense_4h_to_h",
    "w2",
    "Wo",
    "fc_out",
    "lin2",
    "layer_2",
    "output_linear",
    "proj_down",
    "w_out",
}
_FFN = {"feed_forward", "mlp", "ffn"}
ACTIVATION, GATE = "act_fn", "_apply_gate"
"""What transformers calls, of stacked experts, the activation of the gate, and the method that makes of gate and up the
input of `down_proj`."""
_ROUTING = {"top_k_index", "router_indices"}
_SKIPPED = {"encoder_attn", "cross_attn", "crossattention", "gate", "router", "router_mlp", "indexer"}


def find_slots(base: nn.Module) -> tuple[Slot, ...]:
    """Sorted by name, float32. Raises InvalidInput when the model has nothing of what is looked for."""
    prefix = layers_path(base)
    found: dict[str, int] = {}
    for path, module in base.named_modules():
        if not path.startswith(prefix) or _SKIPPED & set(path.split(".")):
            continue
        below = path[len(prefix) :].split(".")[1:]  # after the layer's number
        if "experts" in below and any(part.isdecimal() for part in below):
            continue
        place = _place(below, module)
        if place == OUT:
            found[OUT + path] = widths(module)[1]
        elif place == IN:
            found[IN + path] = widths(module)[0]
        elif _is_experts(module):
            found[f"{IN}{path}.down_proj"] = _inner_width(module)
    if not found:
        raise InvalidInput(
            "No key, value or feed-forward projections were found in this model.",
            "(IA)³ patches need a decoder from the transformers library.",
        )
    return tuple(Slot(name, (width,), "float32") for name, width in sorted(found.items()))


def initial(slots: Sequence[Slot]) -> dict[str, Tensor]:
    """Ones: every activation as it is."""
    return {slot.name: torch.ones(slot.shape, dtype=torch.float32) for slot in slots}


class Applier:
    """Hooks on the modules of `base` that `slots` name; slots of modules that are not there are left out."""

    def __init__(self, base: nn.Module, slots: Sequence[str]) -> None:
        self._state: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._wrapped: list[tuple[nn.Module, str, Any]] = []
        modules = dict(base.named_modules())
        for slot in slots:
            path = slot.removeprefix(OUT).removeprefix(IN)
            module, parent = modules.get(path), modules.get(path.rpartition(".")[0])
            if module is not None and slot.startswith(OUT):
                self._handles.append(module.register_forward_hook(self._scale_output(slot)))
            elif module is not None and slot.startswith(IN):
                self._handles.append(module.register_forward_pre_hook(self._scale_input(slot)))
            elif parent is not None and slot.startswith(IN) and _is_experts(parent):
                activation = getattr(parent, ACTIVATION, None)
                if _has_own_gate(parent):
                    self._scale_call(parent, GATE, slot)
                elif isinstance(activation, nn.Module):
                    self._handles.append(activation.register_forward_hook(self._scale_output(slot)))
                else:
                    self._scale_call(parent, ACTIVATION, slot)
                self._split_rows(parent, slot)

    @contextmanager
    def use(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """state: [D] or, one vector a row of the batch, [B, D]."""
        before = self._state
        self._state = dict(state or {})
        try:
            yield
        finally:
            self._state = before

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module, name, before in self._wrapped:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        self._handles.clear()
        self._wrapped.clear()

    def _scale_output(self, slot: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            vector = self._state.get(slot)
            return None if vector is None else _scaled(output, vector)

        return hook

    def _scale_input(self, slot: str) -> Callable[[nn.Module, Any], tuple[Any, ...] | None]:
        def hook(module: nn.Module, args: Any) -> tuple[Any, ...] | None:
            vector = self._state.get(slot)
            return None if vector is None else (_scaled(args[0], vector), *args[1:])

        return hook

    def _scale_call(self, experts: nn.Module, name: str, slot: str) -> None:
        """Of a function that is no module: what it returns."""
        function = getattr(experts, name)

        def scaled(*args: Tensor) -> Tensor:
            output: Tensor = function(*args)
            vector = self._state.get(slot)
            return output if vector is None else _scaled(output, vector)

        self._wrap(experts, name, scaled)

    def _wrap(self, module: nn.Module, name: str, function: Callable[..., Tensor]) -> None:
        self._wrapped.append((module, name, vars(module).get(name)))
        setattr(module, name, function)

    def _split_rows(self, experts: nn.Module, slot: str) -> None:
        """Experts see tokens sorted by expert, not rows of a batch: rows with vectors of their own go one by one."""
        forward = experts.forward

        def by_row(hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
            vectors = self._state.get(slot)
            if vectors is None or vectors.ndim == 1:
                whole: Tensor = forward(hidden, *routing, **named)
                return whole
            tokens = hidden.shape[0] // vectors.shape[0]
            state, outputs = self._state, []
            try:
                for row, vector in enumerate(vectors):
                    part = slice(row * tokens, (row + 1) * tokens)
                    self._state = {**state, slot: vector}
                    arguments = {name: t[part] for name, t in named.items()}
                    outputs.append(forward(hidden[part], *(t[part] for t in routing), **arguments))
            finally:
                self._state = state
            return torch.cat(outputs)

        self._wrap(experts, "forward", by_row)


class Trainee:
    """The vectors of a patch, from those of its parent on. See `patch_kind.Trainee`."""

    def __init__(self, applier: patch_kind.Applier, parent: Mapping[str, Tensor], device: torch.device | str) -> None:
        """parent: {slot: [D]}; device: of the parameters. The applier is this trainee's from now on."""
        self.parameters: Mapping[str, Tensor] = {
            name: vector.detach().to(device, torch.float32, copy=True).requires_grad_(True)
            for name, vector in sorted(parent.items())
        }
        self._used: Mapping[str, Tensor] = self.parameters
        self._applier = applier

    def use(self) -> AbstractContextManager[None]:
        return self._applier.use(self._used)

    def adapter(self) -> dict[str, Tensor]:
        return {name: vector.detach().to("cpu", copy=True) for name, vector in self.parameters.items()}

    def squared_gradients(self, losses: Callable[[slice], Tensor], rows: int) -> dict[str, Tensor]:
        """By slot, [D]. Every example has its own copy of the vectors, so that one backward pass yields the gradient of
        each alone."""
        copies = {n: v.detach().expand(rows, -1).clone().requires_grad_(True) for n, v in self.parameters.items()}
        self._used = copies
        try:
            with torch.enable_grad(), self.use():
                loss = losses(slice(0, rows)).sum()
        finally:
            self._used = self.parameters
        gradients = torch.autograd.grad(loss, list(copies.values()), allow_unused=True, materialize_grads=True)
        return {n: g.double().square().sum(0).cpu() for n, g in zip(copies, gradients, strict=True)}

    def remove(self) -> None:
        self._applier.remove()


class Kind:
    """See `patch_kind.PatchKind`. A blob holds the vectors, by slot, or all of them against the parent's in four
    bits."""

    name, prefix, bytes_each, learning_rate = "ia3@1", PREFIX, 6, 5e-3
    options: tuple[str, ...] = ()
    fit, relative, continued = Fit.SLOTS, False, True

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        return find_slots(base)

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return initial(slots)

    def applier(self, base: nn.Module, slots: Sequence[str]) -> patch_kind.Applier:
        return Applier(base, slots)

    def trainee(self, lesson: Lesson) -> Trainee:
        return Trainee(self.applier(lesson.base, sorted(lesson.parent)), lesson.parent, lesson.device)

    def read(self, adapter: Raw, slots: Sequence[Slot], limit: int) -> Change:
        if fourbit.holds(adapter):
            places = slot_places(slots)
            return Change(fourbit.Decoded(adapter, places, limit), True, places)
        values = blob.unpack(adapter, slots, limit)
        if not values:
            raise Rejected("shape", "The patch changes nothing.")
        places = tuple((name, tuple(vector.shape)) for name, vector in sorted(values.items()))
        return Change(laid_out(values), False, places)

    def read_fisher(self, change: Change, fisher: Raw, limit: int) -> Mapping[str, Tensor]:
        return compact.Decoded(fisher, change.fisher_places, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(moments)

    def adapter_of(
        self, updates: Mapping[str, Tensor], parent: Mapping[str, Tensor], rank: int, like: Change | None = None
    ) -> tuple[dict[str, Tensor], float]:
        return {slot: (parent[slot].double() + update.double()).float() for slot, update in updates.items()}, 1.0

    def reduced(self, slot: str, mass: Tensor, update: Tensor) -> dict[str, Tensor]:
        return {slot: mass}


def _scaled(t: Tensor, vector: Tensor) -> Tensor:
    if vector.ndim == 2:
        if t.ndim > 2:
            vector = vector.view(vector.shape[0], *[1] * (t.ndim - 2), vector.shape[1])
        elif t.shape[0] != vector.shape[0]:
            vector = vector.repeat_interleave(t.shape[0] // vector.shape[0], 0)  # a flattened [B·T, D]
    return (t * vector).to(t.dtype)


def layers_path(base: nn.Module) -> str:
    """`path.` of the outermost module list that holds the most parameters: the decoder's layers."""
    lists = {path: module for path, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {p: m for p, m in lists.items() if not any(p != q and p.startswith(f"{q}.") for q in lists)}
    if not outer:
        raise InvalidInput("This model has no list of layers.", "Use a decoder from the transformers library.")
    sizes: dict[str, int] = defaultdict(int)
    for path, module in outer.items():
        sizes[path] = sum(p.numel() for p in module.parameters())
    return max(sizes, key=lambda path: sizes[path]) + "."


def _place(below: list[str], module: nn.Module) -> str | None:
    """`below`: names from the layer (exclusive) to the module."""
    if not below or widths(module) == (0, 0):
        return None
    *parents, name = below
    if name in _KEYS_VALUES | _FUSED and not _FFN & set(parents):
        return OUT
    attention = any("attn" in p or "attention" in p for p in parents)
    if (name in _DOWN and not attention) or (name == "value" and "feed_forward" in parents):  # the latter is RWKV's
        return IN
    if below == ["output", "dense"] or below[:2] == ["feed_forward", "output"]:  # BERT's and its kin's
        return IN
    return None


def widths(module: nn.Module) -> tuple[int, int]:
    """(input, output) of a linear layer of any make; zeros when it is none. GPT-2's Conv1D calls them nx and nf."""
    if isinstance(module, nn.Module) and hasattr(module, "nf") and hasattr(module, "nx"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return 0, 0


def _is_experts(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "down_proj", None), nn.Parameter)
        and hasattr(module, "gate_up_proj")
        and (callable(getattr(module, ACTIVATION, None)) or _has_own_gate(module))
        and not _ROUTING.isdisjoint(inspect.signature(type(module).forward).parameters)
    )


def _has_own_gate(experts: nn.Module) -> bool:
    """Whether it does not go without a gate of its own, as transformers' decorator gives one to all others."""
    gate = getattr(type(experts), GATE, None)
    return gate is not None and gate.__name__ == GATE


def _inner_width(experts: nn.Module) -> int:
    """Of stacked weights whose orientation differs by family: gate_up_proj has sides H and 2·I, down_proj H and I."""
    down, up = experts.get_parameter("down_proj"), experts.get_parameter("gate_up_proj")
    return next(side for side in down.shape[1:] if 2 * side in up.shape[1:])
