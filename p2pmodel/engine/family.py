"""What a family of models looks like from outside: where its list of layers is, and how to build it in part.

Nothing here knows a family by name. A model class of transformers is built whole on the meta device, where it costs
nothing; then what is not wanted is replaced by modules without parameters, and only the rest is loaded.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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


def lists_like(base: nn.Module, stack: str) -> tuple[str, ...]:
    """Paths of the other lists of modules that have the same name, such as the layers of what sees or hears."""
    leaf = stack.rsplit(".", 1)[-1]
    return tuple(
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and path.rsplit(".", 1)[-1] == leaf and path != stack
    )


def layer_of(name: str, stack: str, others: Sequence[str] = ()) -> int | None:
    """The layer that a tensor belongs to, by its name in a checkpoint; None for embeddings, norms, heads, and what is
    in the lists `others`."""
    # The leaf alone, since checkpoints name the modules around the list differently from the classes.
    found = re.search(rf"(?:^|\.){re.escape(stack.rsplit('.', 1)[-1])}\.(\d+)\.", name)
    if found is None:
        return None
    around = set(name[: found.start()].split("."))

    def shared(path: str) -> int:
        return len(around & set(path.split(".")[:-1]))

    return int(found[1]) if shared(stack) >= max(map(shared, others), default=0) else None


class Scratch:
    """What stand-ins return while a forward runs: `value` [B, T, width], as the embeddings would be, filled with
    `filling`; nobody uses it. arity: the form in which the family takes a layer's output, see ARITIES. calls: where
    the layers that are called are noted, while somebody watches."""

    value: Tensor | None = None
    filling = 0.0
    width = 0
    arity = 0
    calls: list[int] | None = None


class StandIn(nn.Module):
    """In place of a module that is not hosted. Layer loops read attributes off their layers (`attention_type`), so it
    has the plain ones of the module it stands for. index: of the layer, None for what is none."""

    def __init__(self, scratch: Scratch, like: nn.Module, index: int | None = None) -> None:
        super().__init__()
        copy_plain_attributes(like, self)
        self._scratch = scratch
        self._index = index
        self._kind = type(like).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scratch = self._scratch
        if self._index is None:
            return scratch.value
        if scratch.calls is not None:
            scratch.calls.append(self._index)
        return (scratch.value, *[ELSEWHERE] * (scratch.arity - 1)) if scratch.arity else scratch.value

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(f"they look into a {self._kind} that is elsewhere")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"they need {name!r} of a {self.__dict__.get('_kind', 'module')} that is elsewhere")


class _Elsewhere:
    """What a layer that is not hosted may have given beside the hidden states. It can be handed on, but not used: None
    would be, as if there were nothing."""

    def _use(self, *args: Any) -> Any:
        raise TypeError("their layers take more than the hidden states from those before them")

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = _use


ELSEWHERE = _Elsewhere()


def layer_output(hidden: Tensor | None, arity: int) -> Any:
    return (hidden, *[None] * (arity - 1)) if arity else hidden


def copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    shared = {name: getattr(source, name, None) for name in dir(type(source)) if name not in dir(nn.Module)}
    for name, value in {**shared, **vars(source)}.items():
        if not name.startswith("_") and name != "training" and (value is None or isinstance(value, str | int | float)):
            object.__setattr__(target, name, value)


def hide_others(base: nn.Module, stack: str, scratch: Scratch) -> None:
    """Puts stand-ins for all that has parameters beside the list of layers."""
    layers, chain = base.get_submodule(stack), owners(base, stack)
    for owner in chain:
        for name, child in list(owner.named_children()):
            if child is not layers and child not in chain and any(True for _ in child.parameters()):
                setattr(owner, name, StandIn(scratch, child))


def load_parts(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    cut: Callable[[PreTrainedModel], None],
    wanted: Callable[[str], bool],
    tied: bool,
    read: Callable[[str, Any], Any] = lambda name, tensor: tensor,
) -> PreTrainedModel:
    """A `kind`, after `cut` has replaced its unwanted parts, with the `wanted` tensors of the checkpoint loaded.

    read: makes of a tensor's name and lazy slice what is loaded in its place, such as a part of it. tied: whether
    weights that the family shares (embeddings and head) are both there. Raises InvalidInput when a tensor that the
    remaining parts need is missing or malformed.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        cut(self)
        if not tied:
            self.all_tied_weights_keys = {}
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                vars(part)["_init_weights"] = partial(_initialise, part, part._init_weights)

    members: dict[str, Any] = {"__init__": build, "__module__": kind.__module__}
    if not tied:
        members |= {"_tied_weights_keys": None, "tie_weights": lambda self, *args, **kwargs: None}
    # Of the same name: transformers keeps registers by the classes' names.
    partial_kind: Any = type(kind.__name__, (kind,), members)
    with quiet_loading(path):
        tensors = {name: read(name, tensor) for name, tensor in weights.select(path, wanted).items()}
        model, report = partial_kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    demand_complete(report, path)
    for part in model.modules():
        vars(part).pop("_init_weights", None)
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def _initialise(model: nn.Module, initialise: Callable[[nn.Module], None], module: nn.Module) -> None:
    """What a family sets for all its layers at once is set for those that are here."""
    with _real_parts(model):
        initialise(module)


@contextmanager
def _real_parts(model: nn.Module) -> Iterator[None]:
    """Lists of modules are without those that hold nothing."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    before = [dict(module._modules) for module in lists]
    for module in lists:
        module._modules = {name: part for name, part in module._modules.items() if part and any(part.state_dict())}
    try:
        yield
    finally:
        for module, modules in zip(lists, before, strict=True):
            module._modules = modules


@contextmanager
def quiet_loading(path: Path) -> Iterator[None]:
    """No progress bars, no reports; errors of the files and of what does not fit them become InvalidInput."""
    try:
        with no_progress_bars(), errors_only():
            yield
    except (OSError, SafetensorError, *FAMILY_ERRORS) as error:
        raise InvalidInput(f"The weights in {path} cannot be loaded: {first_line(error)}.") from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Of transformers' own, which are there also where nobody looks at a terminal."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def errors_only() -> Iterator[None]:
    """transformers keeps its advice to itself: it is for those who call it, not for those who see our output."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def demand_complete(report: Mapping[str, Any], path: Path) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise InvalidInput(f"The weights in {path} lack {len(missing)} tensors of the model, such as {missing[0]}.")


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name under which a model's forward takes its cache: the recurrent families have their own."""
    names = parameters_of(forward)
    return "cache_params" if "cache_params" in names and "past_key_values" not in names else "past_key_values"


def parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    """The names of a forward's arguments."""
    return frozenset(inspect.signature(forward).parameters)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
