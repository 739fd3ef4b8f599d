"""The client's part of a model: the family's own CausalLM, whose list of layers is one module that calls the swarm.

Embeddings, final norm and head are here, so `generate()`, sampling, streamers and losses are those of transformers.
"""

import weakref
from contextlib import closing
from contextvars import ContextVar
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from p2pmodel.domain.errors import InvalidInput, PeerFailed, UsageError
from p2pmodel.engine import family
from p2pmodel.engine.cache import CountingCache
from p2pmodel.engine.checkpoint import Checkpoint

NO_ATTENTION = "p2pmodel_remote"
"""Not registered anywhere, so the family prepares no masks: what attends is elsewhere."""

TRIAL_SHAPE = (5, 3)

_made: ContextVar[list["RemoteCache"]] = ContextVar("caches of the generate() that runs in this thread")


class RemoteSession(Protocol):
    def forward(self, hidden: Tensor, position: int) -> Tensor:
        """hidden [1, T, H], float32 on the CPU, of the tokens from `position` on -> the same, behind all layers."""

    def close(self) -> None: ...


class RemoteChain(Protocol):
    def open(self, max_tokens: int) -> RemoteSession: ...


def load_head(checkpoint: Checkpoint, chain: RemoteChain, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Reads only the tensors that belong to no layer. One row at a time, without padding; threads may share it.

    `generate()` opens a session and closes it; to go on where it ended, pass it `past_key_values=RemoteCache(chain, n)`
    and close that. Raises InvalidInput when weights are missing, and when models of this family cannot be split.
    """
    causal = checkpoint.causal_class()
    # Of the same name: transformers keeps registers by the classes' names.
    kind = type(causal.__name__, (_OverChain, causal), {"__module__": causal.__module__, "chain": chain})

    layers: list[RemoteLayers] = []

    def cut(model: PreTrainedModel) -> None:
        # Looked for from the CausalLM down: in some families the base model is not where its class says.
        stack = family.find_stack(model, checkpoint.layers)
        layers.append(RemoteLayers(chain, model.get_submodule(f"{stack}.0")))
        setattr(family.owners(model, stack)[-1], stack.rsplit(".", 1)[-1], nn.ModuleList(layers))

    model = family.load_parts(
        kind,
        checkpoint.config,
        checkpoint.path,
        dtype,
        "cpu",
        cut,
        wanted=lambda name: family.layer_of(name, checkpoint.stack) is None,
        tied=True,
    )
    model.register_forward_pre_hook(_prepare, with_kwargs=True)
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    _try_out(model, layers[0], checkpoint)
    return model


class RemoteCache(CountingCache):
    """The session that a sequence of forwards belongs to; opened by the first, closed by `close` or with the object."""

    def __init__(self, chain: RemoteChain, max_tokens: int) -> None:
        super().__init__()
        self._chain = chain
        self._max_tokens = max_tokens
        self._session: RemoteSession | None = None
        self._closer: weakref.finalize[[], Any] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, T, H], the tokens after those seen -> [1, T, H]."""
        if self._session is None:
            self._session = self._chain.open(self._max_tokens)
            self._closer = weakref.finalize(self, self._session.close)
            self._closer.atexit = False
        output = self._session.forward(hidden, self.seen)
        self.seen += hidden.shape[1]
        return output

    def close(self) -> None:
        """Ends the session; closing twice is closing once."""
        if self._closer is not None:
            self._closer()


class RemoteLayers(nn.Module):
    """All the layers, as the one layer that the family's loop sees."""

    def __init__(self, chain: RemoteChain, like: nn.Module) -> None:
        super().__init__()
        family.copy_plain_attributes(like, self)
        self._chain = chain
        self.arity = 0
        self._on_trial = False

    def trial(self, base: nn.Module) -> Tensor:
        """What `base` makes of some rows of tokens when its layers do nothing."""
        self._on_trial = True
        try:
            with torch.inference_mode():
                hidden: Tensor = base(input_ids=torch.zeros(TRIAL_SHAPE, dtype=torch.long), use_cache=False)[0]
        finally:
            self._on_trial = False
        return hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self._on_trial:
            return family.layer_output(hidden, self.arity)
        if hidden.shape[0] != 1:
            raise UsageError("The swarm generates one sequence at a time.", "Send each prompt alone, without beams.")
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if isinstance(cache, RemoteCache):
            output = self._call(cache, hidden)
        elif cache is None:
            with closing(RemoteCache(self._chain, hidden.shape[1])) as own:
                output = self._call(own, hidden)
        else:
            raise UsageError(f"A {type(cache).__name__} cannot hold what other machines have.", "Pass a RemoteCache.")
        return family.layer_output(output, self.arity)

    def _call(self, cache: RemoteCache, hidden: Tensor) -> Tensor:
        output = cache.forward(hidden.to("cpu", torch.float32))
        if output.shape != hidden.shape or not bool(torch.isfinite(output).all()):
            raise PeerFailed("The layers' answer is not finite, or not of the shape that was asked for.")
        return output.to(hidden.device, hidden.dtype)


class _OverChain:
    """What is added to a family's CausalLM: its generate() keeps its cache in the swarm."""

    chain: RemoteChain

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        made: list[RemoteCache] = []
        token = _made.set(made)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _made.reset(token)
            for cache in made:
                cache.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        name = family.cache_argument(self.forward)  # type: ignore[attr-defined]
        if model_kwargs.get(name) is None and generation_config.use_cache:
            model_kwargs[name] = RemoteCache(self.chain, max_cache_length)
            _made.get().append(model_kwargs[name])


def _prepare(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the CausalLM's forward. Without a cache that was passed there is none: nobody would close its session."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise UsageError("The swarm takes no padded sequences.", "Send each prompt by itself.")
    if kwargs.get(family.cache_argument(model.forward)) is None:
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def _try_out(model: PreTrainedModel, layers: RemoteLayers, checkpoint: Checkpoint) -> None:
    """Finds the form in which the family's loop takes a layer's output: the one with which a forward comes to its end.
    Masks are left out where the family can do without."""
    attention = model.config._attn_implementation
    problem = ""
    for implementation, arity in product((NO_ATTENTION, attention), family.ARITIES):
        model.config._attn_implementation = implementation
        layers.arity = arity
        try:
            hidden = layers.trial(model.base_model)
        except family.FAMILY_ERRORS as error:
            problem = problem or family.first_line(error)
            continue
        if hidden.ndim == 3 and hidden.shape[:2] == TRIAL_SHAPE:
            return
    raise InvalidInput(f"Models of type {checkpoint.architecture} cannot be used over the swarm: {problem}.")
