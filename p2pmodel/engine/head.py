"""The client's part of a model: the family's own CausalLM, whose list of layers is one module that calls the swarm.

Embeddings, final norm and head are here, so `generate()`, sampling, streamers and losses are those of transformers.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from p2pmodel.domain.errors import InvalidInput, PeerFailed, UsageError
from p2pmodel.engine import family
from p2pmodel.engine.cache import CountingCache
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.steps import Microbatch, Note

NO_ATTENTION = "p2pmodel_remote"
"""Not registered anywhere, so the family prepares no masks: what attends is elsewhere."""

TRIAL_SHAPE = (5, 3)

NO_VECTORS: Mapping[str, Tensor] = MappingProxyType({})

_vectors: ContextVar[Mapping[str, Tensor] | None] = ContextVar(
    "vectors that this thread runs models with", default=None
)
_made: ContextVar[list["RemoteCache"]] = ContextVar("caches of the generate() that runs in this thread")


class RemoteSession(Protocol):
    def forward(self, hidden: Tensor, position: int, note: Note) -> Tensor:
        """hidden [B, T, H], float32 on the CPU, of the tokens from `position` on -> the same, behind all layers, of
        the tokens that are wanted. `position` may lie before the end of what was sent, when the session rewinds."""

    def close(self) -> None: ...


class RemoteTape(Protocol):
    """Forwards whose gradients are asked for afterwards. Shapes: B rows, T tokens; float32 on the CPU."""

    def forward(self, hidden: Tensor, microbatch: Microbatch, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """[B, T, H] -> the same behind all layers, with `vectors` [D] or [B, D] in their slots, and a ticket."""

    def backward(self, ticket: Any, gradient: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """gradient [B, T, H] of the output -> that of the hidden states, None where `inputs` was not asked for, and
        those of the vectors, each of its shape."""


class RemoteChain(Protocol):
    def open(
        self, max_tokens: int, rows: int, rewinds: bool, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> RemoteSession:
        """vectors: [D] of slots in which this session differs from its version."""

    def tape(self) -> RemoteTape:
        """One for all forwards of this chain, whatever thread they are in."""

    def close(self) -> None:
        """Leaves the swarm. Nothing is opened afterwards."""


@dataclass(frozen=True, eq=False)
class _Call:
    """What the CausalLM was called with: mask [B, seen + T], positions [B, T], of how many last tokens the logits are
    wanted (0: of all)."""

    mask: Tensor | None
    positions: Tensor | None
    wanted: int


_NOT_CALLED = _Call(None, None, 0)
_call: ContextVar[_Call] = ContextVar("the forward that runs in this thread", default=_NOT_CALLED)


def load_head(checkpoint: Checkpoint, chain: RemoteChain, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Reads only the tensors that belong to no layer. Threads may share it. Its parameters require no gradients.

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
        kind, checkpoint.config, checkpoint.path, dtype, "cpu", cut, wanted=checkpoint.in_head, tied=True
    )
    model.requires_grad_(False)
    model.__dict__["remote"] = layers[0]  # once in the list of layers is enough for a module
    model.register_forward_pre_hook(_prepare, with_kwargs=True)
    model.register_forward_hook(_forget, always_call=True)
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    _try_out(model, layers[0], checkpoint)
    return model


class RemoteCache(CountingCache):
    """The session that a sequence of forwards belongs to; opened by the first, closed by `close` or with the object.

    rewinds: whether tokens may be taken back with `crop`, as assisted generation does; vectors: of slots, [D], in which
    the session differs from its version.
    """

    def __init__(
        self, chain: RemoteChain, max_tokens: int, rewinds: bool = False, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> None:
        super().__init__()
        self._chain = chain
        self._vectors = vectors
        self._max_tokens = max_tokens
        self._rewinds = rewinds
        self._order: Tensor | None = None
        self._session: RemoteSession | None = None
        self._closer: weakref.finalize[[], Any] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H], the tokens after those seen -> [B, T, H]; zeros for those that the CausalLM makes no logits of."""
        call = _call.get()
        if self._session is None:
            self._session = self._chain.open(self._max_tokens, hidden.shape[0], self._rewinds, self._vectors)
            self._closer = weakref.finalize(self, self._session.close)
            self._closer.atexit = False
        tokens = hidden.shape[1]
        wanted = call.wanted if 0 < call.wanted < tokens else None
        note = Note(
            _mask_of(call, tokens), _positions_of(call, self.seen, hidden.shape[0], tokens), self._order, wanted
        )
        output = self._session.forward(hidden, self.seen, note)
        self._order = None
        self.seen += tokens
        if wanted is not None and output.shape[1] == wanted:
            output = functional.pad(output, (0, 0, tokens - wanted, 0))
        return output

    def reorder_cache(self, beam_idx: Tensor) -> None:
        order = beam_idx.cpu() if self._order is None else self._order[beam_idx.cpu()]
        self._order = None if torch.equal(order, torch.arange(len(order))) else order

    def crop(self, tokens_to_remove: int) -> None:
        self.seen -= abs(tokens_to_remove)

    def activate_past_recording(self) -> None:
        if self._session is not None and not self._rewinds:
            raise UsageError("This session cannot take tokens back.", "Make its RemoteCache with rewinds=True.")
        self._rewinds = True

    def close(self) -> None:
        """Ends the session; closing twice is closing once."""
        if self._closer is not None:
            self._closer()


def _mask_of(call: _Call, tokens: int) -> Tensor | None:
    """[B, T] of this step's tokens, or None when nothing was ever masked."""
    if call.mask is None or bool(call.mask.all()):
        return None
    return call.mask[:, call.mask.shape[1] - tokens :].bool().cpu()


def _positions_of(call: _Call, seen: int, rows: int, tokens: int) -> Tensor | None:
    if call.positions is None:
        return None
    positions = call.positions.cpu()
    plain = bool((positions == torch.arange(seen, seen + tokens)).all())
    return None if plain else positions.expand(rows, tokens)


class RemoteLayers(nn.Module):
    """All the layers, as the one layer that the family's loop sees."""

    def __init__(self, chain: RemoteChain, like: nn.Module) -> None:
        super().__init__()
        family.copy_plain_attributes(like, self)
        self._chain = chain
        self.own_vectors: Mapping[str, Tensor] = NO_VECTORS
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
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        vectors = self.vectors
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *vectors.values()))
        if isinstance(cache, RemoteCache):
            if differentiable:
                raise UsageError("No gradients come back through a cache.", "Call the model in torch.no_grad().")
            output = cache.forward(hidden.to("cpu", torch.float32))
        elif cache is not None:
            raise UsageError(f"A {type(cache).__name__} cannot hold what other machines have.", "Pass a RemoteCache.")
        elif differentiable:
            output = self._through(hidden, vectors)
        else:
            with closing(RemoteCache(self._chain, hidden.shape[1], vectors=vectors)) as own:
                output = own.forward(hidden.to("cpu", torch.float32))
        if output.shape != hidden.shape or not bool(torch.isfinite(output).all()):
            raise PeerFailed("The layers' answer is not finite, or not of the shape that was asked for.")
        return family.layer_output(output.to(hidden.device, hidden.dtype), self.arity)

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """Those of `using_vectors` in this thread, or else the model's own."""
        used = _vectors.get()
        return self.own_vectors if used is None else used

    def _through(self, hidden: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        call, (rows, tokens) = _call.get(), hidden.shape[:2]
        microbatch = Microbatch(
            rows, _mask_of(call, tokens), _positions_of(call, 0, rows, tokens), inputs=hidden.requires_grad
        )
        names = sorted(vectors)
        output: Tensor = _ThroughChain.apply(  # type: ignore[no-untyped-call]
            self._chain.tape(), microbatch, names, hidden, *(vectors[name] for name in names)
        )
        return output


class _ThroughChain(torch.autograd.Function):
    """Layers that are elsewhere, as one differentiable operation of the hidden states and the vectors."""

    @staticmethod
    def forward(
        ctx: Any, tape: RemoteTape, microbatch: Microbatch, names: list[str], hidden: Tensor, *vectors: Tensor
    ) -> Tensor:
        given = {name: vector.detach().to("cpu", torch.float32) for name, vector in zip(names, vectors, strict=True)}
        output, ctx.ticket = tape.forward(hidden.detach().to("cpu", torch.float32), microbatch, given)
        ctx.tape, ctx.names = tape, names
        ctx.like = [(t.device, t.dtype) for t in (hidden, *vectors)]
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, by_name = ctx.tape.backward(ctx.ticket, gradient.to("cpu", torch.float32))
        parts = [inputs, *(by_name[name] for name in ctx.names)]
        return (
            None,
            None,
            None,
            *(
                None if part is None else part.to(device, dtype)
                for part, (device, dtype) in zip(parts, ctx.like, strict=True)
            ),
        )


@contextmanager
def using_vectors(vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, and in this thread: models over the swarm compute with `vectors` in their slots instead of what their
    version, or they themselves, have there. Each is [D], or [B, D] with one for every row of the batch; gradients flow
    into those that require them."""
    token = _vectors.set(vectors)
    try:
        yield
    finally:
        _vectors.reset(token)


class RemoteApplier:
    """A `patch_kind.Applier` of models over the swarm, in the thread that uses it."""

    def use(self, state: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        return using_vectors(state or NO_VECTORS)

    def remove(self) -> None:
        """Nothing has been put on the model."""


class _OverChain:
    """What is added to a family's CausalLM: its generate() keeps its cache in the swarm, and a `with` statement ends
    with leaving it."""

    chain: RemoteChain
    remote: RemoteLayers

    def run_with(self, vectors: Mapping[str, Tensor]) -> None:
        """From now on, in every thread: `vectors` [D] are what the model has in their slots, instead of its version's.
        Parameters are trained with any optimiser, after `loss.backward()`."""
        self.remote.own_vectors = vectors

    def close(self) -> None:
        self.chain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
            model_kwargs[name] = RemoteCache(self.chain, max_cache_length, vectors=self.remote.vectors)
            _made.get().append(model_kwargs[name])


def _prepare(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the CausalLM's forward. Without a cache that was passed there is none: nobody would close its session."""
    mask, wanted = kwargs.get("attention_mask"), kwargs.get("logits_to_keep", 0)
    if mask is not None and mask.ndim != 2:
        raise UsageError("The swarm takes masks of rows and tokens only.", "Pass an attention_mask [B, T].")
    if kwargs.get(family.cache_argument(model.forward)) is None:
        kwargs = {**kwargs, "use_cache": False}
    _call.set(_Call(mask, kwargs.get("position_ids"), wanted if isinstance(wanted, int) else 0))
    return args, kwargs


def _forget(model: PreTrainedModel, args: Any, output: Any) -> None:
    _call.set(_NOT_CALLED)


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
