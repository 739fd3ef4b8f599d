"""What a family of models looks like from outside: where its list of layers is, and how to build it in part.

Nothing here knows a family by name. A model class of transformers is built whole on the meta device, where it costs
nothing; then what is not wanted is replaced by modules without parameters, and only the rest is loaded.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine import weights

FAMILY_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What the code of a family that cannot be split raises when it meets a part that is not there."""

ARITIES = (0, 2, 1, 3)
"""Forms in which the loops over the layers take a layer's output: 0 is the tensor itself, n a tuple of n that begins
with it."""


def find_stack(base: nn.Module, layers: int) -> str:
    """Path of the list of `layers` modules that has the most parameters. Raises InvalidInput when there is none."""
    sizes = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    }
    if not sizes:
        raise InvalidInput(f"{type(base).__name__} has no list of {layers} decoder layers, so it cannot be split.")
    return str(max(sizes, key=lambda path: sizes[path]))


def owners(base: nn.Module, stack: str) -> list[nn.Module]:
    """The modules on the way from `base` (first) to the one that holds the list (last)."""
    chain = [base]
    for name in stack.split(".")[:-1]:
        chain.append(chain[-1].get_submodule(name))
    return chain


def layer_of(name: str, stack: str) -> int | None:
    """The layer that a tensor belongs to, by its name in a checkpoint; None for embeddings, norms and heads."""
    # The leaf alone, since checkpoints name the modules around the list differently from the classes.
    found = re.search(rf"(?:^|\.){re.escape(stack.rsplit('.', 1)[-1])}\.(\d+)\.", name)
    return int(found[1]) if found else None


class Scratch:
    """What stand-ins return while a forward runs: `value` [B, T, width], as the embeddings would be; nobody uses it.
    arity: the form in which the family takes a layer's output, see ARITIES."""

    value: Tensor | None = None
    width = 0
    arity = 0


class StandIn(nn.Module):
    """In place of a module that is not hosted. Layer loops read attributes off their layers (`attention_type`), so it
    has the plain ones of the module it stands for."""

    def __init__(self, scratch: Scratch, like: nn.Module, is_layer: bool = False) -> None:
        super().__init__()
        copy_plain_attributes(like, self)
        self._scratch = scratch
        self._is_layer = is_layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scratch = self._scratch
        return layer_output(scratch.value, scratch.arity) if self._is_layer else scratch.value


def layer_output(hidden: Tensor | None, arity: int) -> Any:
    return (hidden, *[None] * (arity - 1)) if arity else hidden


def copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    shared = {name: getattr(source, name, None) for name in dir(type(source)) if name not in dir(nn.Module)}
    for name, value in {**shared, **vars(source)}.items():
        if not name.startswith("_") and name != "training" and (value is None or isinstance(value, str | int | float)):
            object.__setattr__(target, name, value)


def load_parts(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    cut: Callable[[PreTrainedModel], None],
    wanted: Callable[[str], bool],
    tied: bool,
) -> PreTrainedModel:
    """A `kind`, after `cut` has replaced its unwanted parts, with the `wanted` tensors of the checkpoint loaded.

    tied: whether weights that the family shares (embeddings and head) are both there. Raises InvalidInput when
    a tensor that the remaining parts need is missing or malformed.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        cut(self)
        if not tied:
            self.all_tied_weights_keys = {}

    members: dict[str, Any] = {"__init__": build, "__module__": kind.__module__}
    if not tied:
        members |= {"_tied_weights_keys": None, "tie_weights": lambda self, *args, **kwargs: None}
    # Of the same name: transformers keeps registers by the classes' names.
    partial: Any = type(kind.__name__, (kind,), members)
    with quiet_loading(path):
        model, report = partial.from_pretrained(
            None, config=config, state_dict=weights.select(path, wanted), dtype=dtype, output_loading_info=True
        )
    demand_complete(report, path)
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


@contextmanager
def quiet_loading(path: Path) -> Iterator[None]:
    """No progress bars, no reports; errors of the files and of what does not fit them become InvalidInput."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except (OSError, SafetensorError, *FAMILY_ERRORS) as error:
        raise InvalidInput(f"The weights in {path} cannot be loaded: {first_line(error)}.") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def demand_complete(report: Mapping[str, Any], path: Path) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise InvalidInput(f"The weights in {path} lack {len(missing)} tensors of the model, such as {missing[0]}.")


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name under which a model's forward takes its cache: the recurrent families have their own."""
    names = inspect.signature(forward).parameters
    return "cache_params" if "cache_params" in names and "past_key_values" not in names else "past_key_values"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
