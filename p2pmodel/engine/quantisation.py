"""Weights in 8 or 4 bits on a GPU, by bitsandbytes: LLM.int8() (Dettmers et al., 2022) and NF4 (QLoRA, Dettmers et al.,
2023).

The span is loaded on the CPU in the precision that it computes in, its linear layers are replaced by quantised ones of
the same names, and moving those to the GPU is what quantises them. Everything else (norms, routers, convolutions, and
experts whose weights are stacked in one tensor) stays as it is.
"""

import logging
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from p2pmodel.domain.errors import InvalidInput, UsageError

INT8, NF4 = "int8", "nf4"
SCHEMES = (INT8, NF4)

OUTLIER_THRESHOLD = 6.0
"""Activations above it are multiplied in the wider precision: the value of the paper."""

log = logging.getLogger(__name__)


def require_library(scheme: str, device: str) -> Any:
    """The bitsandbytes module. Raises UsageError without a GPU, or without the library."""
    if not device.startswith("cuda"):
        raise UsageError(f"{scheme} needs a GPU.", "Name one with --gpu, or use --dtype bf16.")
    try:
        return import_module("bitsandbytes")
    except ImportError:
        raise UsageError(
            f"{scheme} needs the library bitsandbytes, which is not installed.", "pip install 'p2pmodel[gpu]'"
        ) from None


def quantise(base: PreTrainedModel, stack: str, scheme: str, device: str) -> PreTrainedModel:
    """`base` on `device`, with the linear layers below its list of layers `stack` quantised. It has to lie on the CPU.

    Raises UsageError as `require_library` does, InvalidInput when there is no linear layer to quantise."""
    library = require_library(scheme, device)
    replaced = 0
    for path, module in list(base.get_submodule(stack).named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            parent, _, name = f"{stack}.{path}".rpartition(".")
            setattr(base.get_submodule(parent), name, _quantised(library, module, scheme))
            replaced += 1
    if not replaced:
        raise InvalidInput(
            f"A {type(base).__name__} has no linear layers that {scheme} could store.", "Use --dtype bf16."
        )
    # It says at every multiplication that inputs become fp16 for it.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # Families that use a linear layer's weight by itself look for this.
    base.config._is_quantized = True
    moved: PreTrainedModel = base.to(device)  # type: ignore[arg-type]
    log.info("%d linear layers are stored in %s", replaced, scheme)
    return moved


def _quantised(library: Any, linear: nn.Module, scheme: str) -> nn.Module:
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    if isinstance(linear, Conv1D):
        weight = weight.T.contiguous()
    outputs, inputs = weight.shape
    layers = library.nn
    if scheme == INT8:
        new = layers.Linear8bitLt(
            inputs, outputs, bias=bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
        )
        new.weight = layers.Int8Params(weight.detach(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"compute_dtype": weight.dtype, "quant_type": "nf4", "compress_statistics": True}
        new = layers.Linear4bit(inputs, outputs, bias=bias is not None, **options)
        new.weight = layers.Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    made: nn.Module = new.requires_grad_(False).eval()
    return made
