"""A state of slots folded into a model's own weights, so that any program computes with it.

A vector on a linear layer's output scales the rows of its weight and its bias; one on its input the columns. That is
the same function up to rounding wherever the layer is linear and its weight is its own. Families are many, so the claim
is tested on the model itself before anything is written.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.tensors import ia3, weights
from p2pmodel.tensors.patch_kind import Runs
from p2pmodel.tensors.smear import is_expert

PROBE_TOKENS = 32
TOLERANCE = 1e-3
"""Of the largest difference between logits, as a share of their spread, in float32."""


@torch.no_grad()
def fold(model: PreTrainedModel, kinds: Runs, state: Mapping[str, Tensor]) -> float:
    """Changes the model, which is in float32, to what it is at `state`. -> the largest difference of its logits on
    some tokens, as a share of their spread.

    Raises InvalidInput naming a slot that cannot be folded, or when the model computes something else afterwards."""
    if any(map(is_expert, state)):
        raise InvalidInput(
            "Modular experts are chosen by the text, and can't be folded into weights.",
            "Serve the version with p2pmodel.",
        )
    changed = {n: t for n, t in state.items() if bool((t != (1 if n.startswith(ia3.PREFIX) else 0)).any())}
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)
    applier = kinds.applier(model.base_model, list(changed))
    with applier.use({name: tensor.to(model.device) for name, tensor in changed.items()}):
        wanted = model(input_ids=tokens).logits.float()
    applier.remove()
    uses = _uses(model)
    for name, tensor in sorted(changed.items(), reverse=True):  # weights before the vectors that scale them
        _fold(model.base_model, name, tensor.to(model.device), uses)
    found = model(input_ids=tokens).logits.float()
    difference = float((found - wanted).abs().max() / wanted.std().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise InvalidInput(
            f"Folded into its weights this model would compute something else (by {difference:.2g} of its logits).",
            "Serve the version with p2pmodel, or export the patch with --peft.",
        )
    return difference


def _uses(model: nn.Module) -> dict[int, int]:
    """How many places have each parameter."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _fold(base: nn.Module, slot: str, tensor: Tensor, uses: Mapping[int, int]) -> None:
    if slot.startswith(weights.PREFIX):
        parameter = base.get_parameter(slot.removeprefix(weights.PREFIX))
        parameter.copy_(weights.folded(parameter, tensor))
        return
    if not slot.startswith(ia3.PREFIX):
        raise InvalidInput(
            f"{slot[:96]!r} is of a kind that cannot be folded into weights.", "Run the version with p2pmodel."
        )
    path = slot.removeprefix(ia3.OUT).removeprefix(ia3.IN)
    on_output = slot.startswith(ia3.OUT)
    if path.endswith(".down_proj") and isinstance(_attribute(base, path), nn.Parameter):
        parameter = base.get_parameter(path)
        _scale_experts(base.get_submodule(path.rpartition(".")[0]), parameter, tensor)
        return
    module = base.get_submodule(path)
    parameter = module.get_parameter("weight")
    if uses[id(parameter)] > 1:
        raise InvalidInput(
            f"{slot[:96]!r} cannot be folded: other layers of the model use the same weight.",
            "Serve the version with p2pmodel, or export the patch with --peft.",
        )
    inputs_last = not hasattr(module, "nf")
    parameter.mul_(tensor[:, None] if on_output == inputs_last else tensor)
    bias = getattr(module, "bias", None)
    if on_output and isinstance(bias, nn.Parameter):
        bias.mul_(tensor)


def _scale_experts(experts: nn.Module, down: Tensor, vector: Tensor) -> None:
    """down [E, H, I] or, where weights lie the other way round, [E, I, H]; vector [I]."""
    up = experts.get_parameter("gate_up_proj")
    inputs_last = down.shape[-1] == len(vector) and up.shape[1] == 2 * len(vector)
    down.mul_(vector if inputs_last else vector[:, None])


def _attribute(base: nn.Module, path: str) -> object:
    parent, _, name = path.rpartition(".")
    return getattr(base.get_submodule(parent), name, None)
