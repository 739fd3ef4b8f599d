"""Adapters as files of `peft`: `adapter_config.json` and `adapter_model.safetensors`.

A module has its path below the causal model in them, a slot below the base model. (IA)³ vectors are columns [D, 1] of a
module's output, or rows [1, D] of a feed-forward module's input; LoRA's factors are A [r, in] and B [out, r], whichever
way round the weight lies.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain import modular
from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.engine.weights import read_json
from p2pmodel.tensors import blob, ia3, lora, weights
from p2pmodel.tensors.patch_kind import MAX_SCALE

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KINDS = {"IA3": "ia3@1", "LORA": "lora@1"}
_ROOT = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.(ia3_l|lora_A\.weight|lora_B\.weight)")
_UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes",
    "use_qalora": "QALoRA's pooling",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "embeddings of tokens",
    "layer_replication": "copies of layers",
    "megatron_config": "Megatron's parallel layers",
    "lora_bias": "biases of LoRA's own",
}


@dataclass(frozen=True)
class PeftAdapter:
    """kind: of the patch that it can become. base: what its settings call the model that it was trained on. tensors: by
    the module's path below the causal model, and the part: `ia3_l`, `lora_A` or `lora_B`; float32."""

    kind: str
    base: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def write(kind: str, model: PreTrainedModel, adapter: Mapping[str, Tensor], base: str) -> dict[str, bytes]:
    """The files, by name. model: the causal model, on any device; adapter: slot values of `ia3@1` against `base`, or
    what the blob of a `lora@1` patch holds. Raises InvalidInput for what peft has no place for."""
    found = _ia3(model, adapter) if kind == "ia3@1" else _lora(model, adapter) if kind == "lora@1" else None
    if found is None:
        hint = "" if kind == modular.KIND else "Write a whole checkpoint instead: --merged DIR"
        raise InvalidInput(f"peft has no adapter for patches of kind {kind}.", hint)
    settings, tensors = found
    common = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    text = json.dumps(common | settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: blob.pack(tensors)}


def read(folder: Path, limit: int) -> PeftAdapter:
    """limit: bytes of the weights. Raises InvalidInput, in one sentence, for whatever cannot become a patch."""
    if not (folder / CONFIG).is_file():
        raise InvalidInput(f"{folder} is no adapter of peft: it has no {CONFIG}.")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise InvalidInput(
                f"{PICKLED} is pickled, which can run code when it is read.",
                "Load it with peft where you trust it, and save it again: save_pretrained(DIR).",
            )
        raise InvalidInput(f"{folder} has no {WEIGHTS}.")
    settings = read_json(folder / CONFIG)
    kind = KINDS.get(str(settings.get("peft_type")))
    if kind is None:
        raise InvalidInput(
            f"Adapters of type {str(settings.get('peft_type'))[:32]!r} cannot be imported.",
            f"Those of {' and '.join(KINDS)} can.",
        )
    for name, what in _UNSUPPORTED.items():
        if settings.get(name):
            raise InvalidInput(f"The adapter has {what} ({name}), which a patch cannot hold.")
    if settings.get("bias", "none") != "none":
        raise InvalidInput("The adapter has trained biases, which a patch of this kind cannot hold.")
    size = (folder / WEIGHTS).stat().st_size
    if size > limit:
        raise InvalidInput(f"{WEIGHTS} has {size} bytes, and a patch of this model at most {limit}.")
    try:
        flat = blob.unpack((folder / WEIGHTS).read_bytes(), None, limit)
    except Rejected as error:
        raise InvalidInput(f"{folder / WEIGHTS} cannot be used: {error.message}") from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        parts = _KEY.fullmatch(name)
        if parts is None or not tensor.is_floating_point() or tensor.ndim != 2:
            raise InvalidInput(f"The adapter has {name[:96]!r}, which is nothing of a patch of kind {kind}.")
        tensors.setdefault(parts[1], {})[parts[2].removesuffix(".weight")] = tensor.float()
    if not tensors:
        raise InvalidInput("The adapter is empty.")
    return PeftAdapter(kind, str(settings.get("base_model_name_or_path") or ""), settings, tensors)


def vectors_of(adapter: PeftAdapter, model: PreTrainedModel, parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an `ia3@1` blob holds: the parent's vectors times the adapter's, which came on top of them. parent: state of
    the version that the adapter was trained on. Raises InvalidInput for modules without a slot."""
    prefix = base_path(model)
    found: dict[str, Tensor] = {}
    for path, parts in adapter.tensors.items():
        slots = [place + path.removeprefix(prefix) for place in (ia3.OUT, ia3.IN)]
        slot = next((name for name in slots if name in parent and path.startswith(prefix)), None)
        vector = parts.get("ia3_l")
        if slot is None or vector is None:
            raise InvalidInput(
                f"The adapter changes {path[:96]!r}, which has no slot in this model.",
                "Train it on the modules that the model's slots name: p2pmodel model show",
            )
        sideways = vector.shape[0] == 1 and vector.shape[1] > 1
        if vector.numel() != parent[slot].numel() or (vector.numel() > 1 and sideways != slot.startswith(ia3.IN)):
            side = "input" if slot.startswith(ia3.IN) else "output"
            raise InvalidInput(
                f"The adapter's vector of {path[:96]!r} does not fit its {side}, which the model's slot is on.",
                "Train it with the same feedforward_modules as the model's slots.",
            )
        found[slot] = (parent[slot].double() * vector.reshape(-1).double()).float()
    return found


def factors_of(adapter: PeftAdapter, model: PreTrainedModel) -> dict[str, Tensor]:
    """What a `lora@1` blob holds. Raises InvalidInput for modules without a slot, and factors that do not fit."""
    prefix, modules = base_path(model), dict(model.named_modules())
    scales = {path: _scale(adapter.settings, path, parts) for path, parts in adapter.tensors.items()}
    scale = max(scales.values())
    if not 0 < scale <= MAX_SCALE:
        raise InvalidInput(f"The adapter's scale of {scale:g} is none that a patch can have.")
    found: dict[str, Tensor] = {}
    for path, parts in adapter.tensors.items():
        module = modules.get(path) if path.startswith(prefix) else None
        if module is None or ia3.widths(module) == (0, 0) or parts.keys() != {"lora_A", "lora_B"}:
            raise InvalidInput(
                f"The adapter changes {path[:96]!r}, which is no linear layer with a slot in this model."
            )
        a, b = parts["lora_A"], parts["lora_B"]
        if (a.shape[1], b.shape[0]) != ia3.widths(module) or a.shape[0] != b.shape[1]:
            raise InvalidInput(f"The adapter's factors of {path[:96]!r} do not fit the model's layer.")
        if scales[path] != scale:
            b = b * (scales[path] / scale)
        slot = f"{weights.PREFIX}{path.removeprefix(prefix)}.weight"
        if hasattr(module, "nf"):
            a, b = b.T.contiguous(), a.T.contiguous()
        found |= {slot + lora.A: a, slot + lora.B: b}
    return found | {lora.SCALE: torch.tensor([scale], dtype=torch.float64)}


def through_vectors(
    held: Mapping[str, Tensor], model: PreTrainedModel, vectors: Mapping[str, Tensor], *, back: bool = False
) -> dict[str, Tensor]:
    """LoRA's factors for a checkpoint into which these vectors are folded, from those for the weights below the
    vectors, or the way back. model: the causal one. Raises InvalidInput where a vector of zeros hides a weight."""
    modules = dict(model.base_model.named_modules())
    found = dict(held)
    for name, factor in held.items():
        slot, _, part = name.rpartition("#")
        path = slot.removeprefix(weights.PREFIX).removesuffix(".weight")
        if not slot:
            continue
        inputs_last = not hasattr(modules[path], "nf")
        vector = vectors.get((ia3.IN if (f"#{part}" == lora.A) == inputs_last else ia3.OUT) + path)
        if vector is None:
            continue
        if back and bool((vector == 0).any()):
            raise InvalidInput(f"The version has zeros over {path[:96]!r}, which hide what the adapter changes.")
        scale = vector.double().reciprocal() if back else vector.double()
        found[name] = (factor.double() * (scale if f"#{part}" == lora.A else scale[:, None])).float()
    return found


def base_path(model: PreTrainedModel) -> str:
    """Of the base model below the causal one, with a dot at its end; empty when they are the same."""
    path = next(name for name, module in model.named_modules() if module is model.base_model)
    return f"{path}." if path else ""


def _ia3(model: PreTrainedModel, vectors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    prefix, modules = base_path(model), dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    targets: dict[str, bool] = {}
    for slot, vector in vectors.items():
        path = prefix + slot.removeprefix(ia3.OUT).removeprefix(ia3.IN)
        if path not in modules or ia3.widths(modules[path]) == (0, 0):
            raise InvalidInput(
                f"peft's (IA)³ has no place for {slot[:96]!r}: it is on no linear layer of its own.",
                "Write a whole checkpoint instead: --merged DIR",
            )
        targets[path] = slot.startswith(ia3.IN)
        tensors[f"{_ROOT}{path}.ia3_l"] = vector.view(1, -1) if targets[path] else vector.view(-1, 1)
    settings = {
        "peft_type": "IA3",
        "target_modules": sorted(targets),
        "feedforward_modules": sorted(path for path, is_input in targets.items() if is_input),
        "fan_in_fan_out": any(hasattr(modules[path], "nf") for path in targets),
        "init_ia3_weights": True,
    }
    return settings, tensors


def _lora(model: PreTrainedModel, held: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Factors of a smaller rank are filled up with zeros, so that one scale does for all."""
    prefix, modules = base_path(model), dict(model.named_modules())
    slots = sorted(name.removesuffix(lora.A) for name in held if name.endswith(lora.A))
    rank = max(held[slot + lora.A].shape[0] for slot in slots)
    tensors: dict[str, Tensor] = {}
    paths = {slot: prefix + slot.removeprefix(weights.PREFIX).removesuffix(".weight") for slot in slots}
    for slot, path in paths.items():
        a, b = held[slot + lora.A], held[slot + lora.B]
        if hasattr(modules[path], "nf"):
            a, b = b.T, a.T
        missing = rank - a.shape[0]
        tensors[f"{_ROOT}{path}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
        tensors[f"{_ROOT}{path}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing))
    settings = {
        "peft_type": "LORA",
        "target_modules": sorted(paths.values()),
        "r": rank,
        "lora_alpha": float(held[lora.SCALE]) * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(hasattr(modules[path], "nf") for path in paths.values()),
    }
    return settings, tensors


def _scale(settings: Mapping[str, Any], path: str, parts: Mapping[str, Tensor]) -> float:
    """alpha / r, or alpha / √r, by the patterns that name a module."""
    rank = parts["lora_A"].shape[0] if "lora_A" in parts else 1
    alpha = settings.get("lora_alpha", rank)
    try:
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return float(alpha) / (sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, re.error, ArithmeticError):
        raise InvalidInput(f"{CONFIG} gives no scale that can be read for {path[:96]!r}.") from None
