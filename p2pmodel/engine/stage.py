"""A stage: the layers of one span, run by the family's own forward, whatever the family.

The base model keeps its list of layers at full length, with stand-ins for what is not hosted, and for embeddings and
norms. Its forward prepares masks, rotary embeddings and windows, and runs through the list; the received hidden state
is put in before the first layer of the span, and an exception ends the forward behind the last one.
"""

import inspect
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.modular import place_of
from p2pmodel.domain.swarm import Span
from p2pmodel.engine import family, quantisation, remote_experts
from p2pmodel.engine.batching import SessionsCache
from p2pmodel.engine.cache import StageCache
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.expert_layout import ExpertLayout
from p2pmodel.engine.trial import try_out
from p2pmodel.tensors import ia3, weights
from p2pmodel.tensors.smear import Course, Pools, is_expert, pools
from p2pmodel.tensors.smear_hooks import Hooks, Running, Together

PAGE_BYTES = 4096
POOLS_KEPT = 4
"""Versions whose experts lie stacked for the sessions to come."""


def load_stage(
    checkpoint: Checkpoint,
    span: Span,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scheme: str = "",
    *,
    trunk: bool = False,
) -> "Stage":
    """Reads the tensors of `span` and no others, and runs a few tokens. scheme: how weights are stored in less than
    `dtype`, one of `quantisation.SCHEMES`, or empty; trunk: without the layers' experts, which are elsewhere: `board`
    is then to be given remote ones. Raises InvalidInput when the checkpoint lacks the span or some of its weights, when
    models of its family cannot be split, and for a trunk of a family whose experts cannot be hosted apart."""
    if span.end > checkpoint.layers:
        raise InvalidInput(f"The model has {checkpoint.layers} layers, so it has no span {span}.")
    wanted = partial(ExpertLayout(checkpoint).in_trunk if trunk else checkpoint.in_span, span=span)
    checkpoint.provide(checkpoint.files_with(wanted))
    scratch = family.Scratch()
    board = remote_experts.Switchboard()

    def cut(base: PreTrainedModel) -> None:
        scratch.width = _embeddings_width(base)
        if trunk:
            remote_experts.send_away(base, checkpoint.stack, span, board)
        _hollow(base, checkpoint.stack, span, scratch)

    base = family.load_parts(
        checkpoint.base_class(),
        checkpoint.config,
        checkpoint.path,
        dtype,
        "cpu" if scheme else device,
        cut,
        wanted=wanted,
        tied=False,
    )
    if scheme:
        base = quantisation.quantise(base, checkpoint.stack, scheme, str(device))
    base.requires_grad_(False)
    if trunk:
        remote_experts.overlap_shared(base)
    stage = Stage(base, checkpoint, span, dtype, scratch, board)
    _touch(base)
    try_out(stage)
    return stage


class Stage:
    """Shapes: B rows, T tokens, H the width of the model. Thread-safe: one forward runs at a time."""

    def __init__(
        self,
        base: PreTrainedModel,
        checkpoint: Checkpoint,
        span: Span,
        dtype: torch.dtype,
        scratch: family.Scratch,
        board: remote_experts.Switchboard,
    ) -> None:
        """board: where rows go that are for experts which are elsewhere."""
        self.base = base
        self.board = board
        self.checkpoint = checkpoint
        self.span = span
        self.dtype = dtype
        self.device = base.device
        self.width = checkpoint.hidden_size
        self.scratch = scratch
        self._cache_name = family.cache_argument(base.forward)
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._siblings = family.owners(base, checkpoint.stack)[-1]._modules
        self._leaf = checkpoint.stack.rsplit(".", 1)[-1]
        self._layers = list(base.get_submodule(checkpoint.stack).children())
        self._lock = threading.RLock()
        self._hidden: Tensor | None = None
        self._selected: Span | None = None
        self._view = _View(self._layers)
        self._edges: list[RemovableHandle] = []
        self._applier = ia3.Applier(base, ())
        self._slots: frozenset[str] = frozenset()
        self._smear = Hooks(base, ())
        self._routed: frozenset[str] = frozenset()
        self._pools: deque[tuple[Mapping[str, Tensor], Pools]] = deque(maxlen=POOLS_KEPT)
        self._places = weights.Places(base, ())

    @property
    def is_trunk(self) -> bool:
        """Whether some of its layers have their experts elsewhere."""
        return bool(self.board.counts)

    def is_elsewhere(self, name: str) -> bool:
        """Whether a slot is of the experts of a layer whose experts are not here."""
        path = name[name.rfind(":") + 1 :]
        return not is_expert(name) and any(path.startswith(f"{owner}.") for owner in self.board.paths)

    @property
    def weight_bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in (*self.base.parameters(), *self.base.buffers()))

    def new_cache(self, span: Span, max_tokens: int, rewinds: bool = False) -> StageCache:
        """For a session that runs `span`, at most what is hosted. Memory is taken as tokens come.

        Raises InvalidInput when the session `rewinds`, and the family keeps states that can't be put back.
        """
        try:
            return StageCache(self.checkpoint.config, span, max_tokens, rewinds)
        except NotImplementedError as error:
            raise InvalidInput(f"A session of this model can't go back: {error}.") from None

    def slot_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that a vector can be for, by name."""
        with self._lock:  # a forward has something else in the place of the layers' list
            return {slot.name: slot.shape for slot in ia3.find_slots(self.base)}

    def prepare_slots(self, names: frozenset[str]) -> None:
        """From now on, forwards apply vectors and experts of these names. Names of places that are not here are passed
        over."""
        layers = {place.layer for place in map(place_of, names) if place is not None}
        names = frozenset(name for name in names if not is_expert(name))
        with self._lock:
            if not layers <= self._routed:
                self._smear.remove()
                self._routed |= layers
                self._smear = Hooks(self.base, self._routed)
            if names <= self._slots:
                return
            self._applier.remove()
            self._slots |= names
            self._applier = ia3.Applier(self.base, sorted(self._slots))

    def prepare_weights(self, names: frozenset[str]) -> Mapping[str, Tensor]:
        """From now on, forwards may be given other weights for slots of these names; returns those that are there, the
        checkpoint's own. Names of places that are not here are passed over."""
        with self._lock:
            self._places.put({})
            self._places = weights.Places(self.base, sorted(names | self._places.originals.keys()))
            return {name: weight for name, weight in self._places.originals.items() if name in names}

    def forward(
        self,
        hidden: Tensor,
        cache: StageCache | None,
        span: Span,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """hidden [B, T, H] through the layers of `span`, part of what is hosted -> [B, T, H], in the stage's dtype.

        cache: of the same span; it takes in T tokens. None for a run without state. position_ids [B, T];
        attention_mask [B, seen + T], for padded rows; vectors: slot state, [D] or by row [B, D], of slots that
        `prepare_slots` was told, and whole weights in place of the checkpoint's, of slots that `prepare_weights` was
        told; experts, which the example's routers choose among: those of a cache are those of its first forward.
        Raises InvalidInput for a span that is not hosted.
        """
        arguments = {}
        course = self._course_of(cache, vectors)
        if course is not None:
            mask = None if attention_mask is None else attention_mask[:, -hidden.shape[1] :].to(self.device).bool()
            course.begin(0 if cache is None else cache.seen, hidden.shape[1], mask)
        if self._takes_positions:
            # Some families count from 0 in every forward when they are not told, whatever is cached.
            if position_ids is None:
                seen = 0 if cache is None else cache.seen
                position_ids = torch.arange(seen, seen + hidden.shape[1]).unsqueeze(0)
            arguments["position_ids"] = position_ids.to(self.device)
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask.to(self.device)
        with self._lock:
            output = self._run(hidden, cache, span, vectors, arguments, course)
        if cache is not None:
            cache.seen += hidden.shape[1]
        return output

    def forward_sessions(
        self, hidden: Tensor, batch: SessionsCache, span: Span, *, vectors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """One token of each row of several sessions, [B, 1, H] -> [B, 1, H]; see `trial.can_batch`."""
        arguments = {"position_ids": batch.positions().to(self.device)} if self._takes_positions else {}
        courses = [cache.course for cache in batch.caches]
        for cache in batch.caches:
            if cache.course is not None:
                cache.course.begin(cache.seen, 1)
        together = Together(courses, batch.slices) if any(courses) else None
        with self._lock, batch.attending(self.base.config):
            output = self._run(hidden, batch, span, vectors, arguments, together)
        batch.finish()
        return output

    def _run(
        self,
        hidden: Tensor,
        cache: StageCache | SessionsCache | None,
        span: Span,
        vectors: Mapping[str, Tensor] | None,
        arguments: dict[str, Any],
        routing: Running | None = None,
    ) -> Tensor:
        if span != self._selected:
            self._select(span)
        scratch = self.scratch
        self._hidden = hidden = hidden.to(self.device, self.dtype)
        # Never the hidden state itself: some families change their embeddings in place.
        scratch.value = hidden.new_full((hidden.shape[0], hidden.shape[1], scratch.width), scratch.filling)
        hosted = self._siblings[self._leaf]
        self._siblings[self._leaf] = self._view
        self._places.put(vectors or {})
        try:
            with self._applier.use(vectors), self._smear.running(routing):
                self.base(
                    inputs_embeds=scratch.value, use_cache=cache is not None, **{self._cache_name: cache}, **arguments
                )
        except _Left as left:
            return left.hidden
        finally:
            self._siblings[self._leaf] = hosted
            self._hidden = scratch.value = None
        raise RuntimeError(f"{type(self.base).__name__} did not run its layers")

    def watch(self, hidden: Tensor) -> list[int]:
        """The layers that a forward calls, in order, when it is let run to its end: a part of it may fail behind the
        hosted span, where there is nothing but stand-ins."""
        calls: list[int] = []
        with self._lock, torch.inference_mode():
            self._select(self.span)
            self._edges[1].remove()
            for index in range(self.span.start, self.span.end):
                note = partial(_note, calls, index)
                self._edges.append(self._layers[index].register_forward_pre_hook(note))
            self.scratch.calls = calls
            try:
                with suppress(*family.FAMILY_ERRORS):  # the last of them: that nothing left the loop
                    self._run(hidden, None, self.span, None, {})
            finally:
                self.scratch.calls = self._selected = None
        return calls

    def _course_of(self, cache: StageCache | None, state: Mapping[str, Tensor] | None) -> Course | None:
        """Of a session, begun by its first forward; of a forward without a cache its own. None without experts."""
        if cache is not None and cache.course is not None:
            return cache.course
        if not state or not any(map(is_expert, state)):
            return None
        if cache is None:
            return Course(pools(state))
        found = next((known for other, known in self._pools if other is state), None)
        if found is None:
            found = pools(state)
            self._pools.append((state, found))
        cache.course = Course(found)
        return cache.course

    def _select(self, span: Span) -> None:
        if not self.span.covers(span):
            raise InvalidInput(f"Layers {span} are not among those that are hosted, {self.span}.")
        for edge in self._edges:
            edge.remove()
        first, last = self._layers[span.start], self._layers[span.end - 1]
        self._edges = [
            first.register_forward_pre_hook(self._enter, with_kwargs=True),
            last.register_forward_hook(_leave),
        ]
        self._view = _View(
            [
                layer if index in span or index not in self.span else family.StandIn(self.scratch, layer, index)
                for index, layer in enumerate(self._layers)
            ]
        )
        self._selected = span

    def _enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden}


class _Left(BaseException):
    """The span's last layer has run. Not an Exception, so that no family's own handler stops it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    raise _Left(output[0] if isinstance(output, tuple | list) else output)


def _note(calls: list[int], index: int, layer: nn.Module, args: Any) -> None:
    calls.append(index)


class _View(nn.Module):
    """What the family's loop takes for its list of layers. Slicing an nn.ModuleList, as most loops do, registers all
    the modules anew, at every token."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self._list = layers

    def __len__(self) -> int:
        return len(self._list)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._list)

    def __getitem__(self, index: int | slice) -> Any:
        return self._list[index]


def _hollow(base: nn.Module, stack: str, span: Span, scratch: family.Scratch) -> None:
    """Puts stand-ins for the layers outside of `span`, and for all else that has parameters on the way to the list."""
    layers = base.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        if index not in span:
            layers[index] = family.StandIn(scratch, layer, index)
    family.hide_others(base, stack, scratch)


def _embeddings_width(base: PreTrainedModel) -> int:
    weight = base.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[-1]


def _touch(base: nn.Module) -> None:
    """Weights are mapped from their files: brings every page in, so that no session waits for the disk."""
    for tensor in base.parameters():
        tensor.detach().reshape(-1)[:: max(1, PAGE_BYTES // tensor.itemsize)].sum()
