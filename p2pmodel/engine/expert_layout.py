"""Where a model keeps its experts: which modules they are, and which tensors of a checkpoint they are made of.

Experts can be hosted apart where the family calls them through transformers' experts interface (`use_experts_
implementation`): there a layer has one module with the weights of all its experts, the first dimension being the
expert, which is called with rows, the experts of each row, and their gates. Checkpoints have these weights stacked in
the same way, or a tensor for each expert; transformers' own table of conversions says which.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.experts import MAX_EXPERTS
from p2pmodel.domain.swarm import Span
from p2pmodel.engine import weights
from p2pmodel.engine.checkpoint import Checkpoint


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of the checkpoint. expert: whose it is; None where it holds those of all, stacked, or what they share.
    stacked: whether its first dimension is the expert."""

    layer: int
    expert: int | None
    stacked: bool


class ExpertLayout:
    """Of one checkpoint. Raises InvalidInput for a family without experts behind the interface."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        with torch.device("meta"):
            self._base: PreTrainedModel = checkpoint.base_class()(deepcopy(checkpoint.config))
        self.paths = find_experts(self._base, checkpoint.stack)
        if not self.paths:
            raise InvalidInput(
                f"Models of type {checkpoint.architecture} have no experts that can be hosted apart: their layers do "
                "not call any through transformers' experts interface.",
                "Host whole layers: leave --experts out.",
            )
        self.counts = {layer: experts_in(self._base.get_submodule(path)) for layer, path in self.paths.items()}
        """Layer -> how many experts it has, of the layers that have any."""

    def counts_in(self, span: Span) -> dict[int, int]:
        """Of the layers of `span` that have any. Raises InvalidInput when none has."""
        counts = {layer: count for layer, count in self.counts.items() if layer in span}
        if not counts:
            raise InvalidInput(f"None of the layers {span} has experts.", "Choose others with --layers.")
        return counts

    def of_shard(self, span: Span, experts: Collection[int]) -> dict[str, ExpertTensor]:
        """The tensors that a host of these experts reads, all or in part. Raises as `tensors`."""
        chosen = frozenset(experts)
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if tensor.layer in span and (tensor.expert is None or tensor.expert in chosen)
        }

    def in_trunk(self, name: str, span: Span) -> bool:
        """Whether a host of the layers without their experts reads it. Raises as `tensors`."""
        return self._checkpoint.in_span(name, span) and name not in self.tensors

    @cached_property
    def tensors(self) -> Mapping[str, ExpertTensor]:
        """By name in the checkpoint, those that experts are made of. Raises InvalidInput for one that belongs to
        several experts in a way that is not known."""
        rules = get_model_conversion_mapping(self._base)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        targets = dict(self._base.state_dict())
        owners = {path: layer for layer, path in self.paths.items()}
        found: dict[str, ExpertTensor] = {}
        self._checkpoint.provide(weights.needed_for_names(self._checkpoint.path))
        for name in weights.tensor_names(self._checkpoint.path):
            if not self._checkpoint.in_span(name, Span(0, self._checkpoint.layers)):
                continue
            target, _ = rename_source_key(name, renamings, converters, self._base.base_model_prefix, targets)
            owner = next((path for path in _above(target) if path in owners), None)
            if owner is None or target not in targets:
                continue
            layer = owners[owner]
            numbers = _numbers(name)
            for number in _numbers(target):
                numbers.remove(number)
            if len(numbers) > 1 or any(number >= self.counts[layer] for number in numbers):
                raise InvalidInput(f"It is not known which expert the tensor {name[:128]} belongs to.")
            direct = target.rpartition(".")[0] == owner
            found[name] = ExpertTensor(layer, numbers[0] if numbers else None, direct and not numbers)
        return found


def fetch_part(checkpoint: Checkpoint, span: Span, experts: Collection[int]) -> None:
    """Brings the files that hold these experts, or with none the layers without their experts, as `provide` does."""
    layout = ExpertLayout(checkpoint)
    trunk = partial(layout.in_trunk, span=span)
    checkpoint.provide(checkpoint.files_with(layout.of_shard(span, experts).__contains__ if experts else trunk))


def find_experts(base: nn.Module, stack: str) -> dict[int, str]:
    """Layer -> path of its experts below `base`. Raises InvalidInput when a layer has several sets of them."""
    found: dict[int, str] = {}
    for index, layer in enumerate(base.get_submodule(stack).children()):
        paths = [path for path, module in layer.named_modules() if path and is_experts(module)]
        if len(paths) > 1:
            raise InvalidInput(f"Layer {index} has {len(paths)} sets of experts, which can't be told apart.")
        if paths:
            found[index] = f"{stack}.{index}.{paths[0]}"
    return found


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module behind transformers' experts interface."""
    return hasattr(module, "_is_expert_parallel") and isinstance(getattr(module, "num_experts", None), int)


def experts_in(module: nn.Module) -> int:
    count = int(module.num_experts)  # type: ignore[arg-type]
    if not 1 <= count <= MAX_EXPERTS:
        raise InvalidInput(f"A layer of {count} experts can't be hosted: there may be {MAX_EXPERTS}.")
    return count


def shrink(module: nn.Module, count: int) -> None:
    """Leaves room for `count` of the experts of a module on the meta device."""
    before = experts_in(module)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and parameter.shape[0] == before:
            module._parameters[name] = nn.Parameter(parameter.new_empty(count, *parameter.shape[1:]), False)
    module.num_experts = count  # type: ignore[assignment]


def skeleton(layer: nn.Module, path: str) -> nn.Module:
    """In place of the layer, modules without anything on the way to what is at `path` in it."""
    root = at = nn.Module()
    *parents, leaf = path.split(".")
    for name in parents:
        inner = nn.Module()
        at.add_module(name, inner)
        at = inner
    at.add_module(leaf, layer.get_submodule(path))
    return root


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]
