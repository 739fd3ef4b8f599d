"""Forward and backward passes of a stage for sessions that train: micro-batches without a cache, frozen weights, and
gradients for the hidden states that came in and for the session's own vectors.

A micro-batch's graph is kept for its backward pass, within a bound for all sessions together. Where there is no room,
the oldest graphs go first: their inputs stay, and the backward pass computes them anew. Inputs count too: of a session
that never asks for gradients the oldest are forgotten, so that it fills no memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from p2pmodel.domain.errors import Busy, NotFound
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.stage import Stage
from p2pmodel.engine.steps import Microbatch

MAX_MICROBATCHES = 1024
"""That one session may have under way."""


@dataclass(eq=False, slots=True)
class _Graph:
    """What autograd holds: the leaves, and the output that depends on them. size: bytes that are kept for it alone."""

    hidden: Tensor
    vectors: dict[str, Tensor]
    output: Tensor
    size: int


@dataclass(eq=False, slots=True)
class _Kept:
    """Of one micro-batch: what it takes to compute it again, and its graph as long as there is room. own: the names of
    the session's own vectors."""

    hidden: Tensor
    microbatch: Microbatch
    state: Mapping[str, Tensor]
    own: tuple[str, ...]
    graph: _Graph | None = None


@dataclass(eq=False, slots=True)
class Reel:
    """The micro-batches of one session that may still be asked for their gradients, by number."""

    span: Span
    kept: dict[int, _Kept] = field(default_factory=dict)


class Tape:
    """Not thread-safe: the thread that computes owns it. Shapes as in `Stage`."""

    def __init__(self, stage: Stage, max_bytes: int) -> None:
        self._stage, self._max_bytes = stage, max_bytes
        self._weights = {t.untyped_storage().data_ptr() for t in (*stage.base.parameters(), *stage.base.buffers())}
        self._graphs: dict[_Kept, None] = {}  # the oldest first
        self._input_bytes = self._graph_bytes = 0
        self.recomputed = 0
        """Backward passes whose graph had been dropped, since the start."""

    @property
    def held_bytes(self) -> int:
        return self._input_bytes + self._graph_bytes

    def forward(
        self,
        reel: Reel,
        number: int,
        hidden: Tensor,
        microbatch: Microbatch,
        state: Mapping[str, Tensor],
        own: tuple[str, ...],
    ) -> Tensor:
        """[B, T, H] -> the same behind the span, and keeps what the backward pass of this `number` needs. A number that
        comes again replaces what was kept. Raises Busy when other sessions fill the memory."""
        self._drop(reel, number)
        while reel.kept and (len(reel.kept) >= MAX_MICROBATCHES or self._input_bytes + _size(hidden) > self._max_bytes):
            self._drop(reel, next(iter(reel.kept)))
        if self._input_bytes + _size(hidden) > self._max_bytes:
            raise Busy("This stage has no memory for another micro-batch.", "Send smaller ones, or try another peer.")
        kept = _Kept(hidden, microbatch, state, own)
        reel.kept[number] = kept
        self._input_bytes += _size(hidden)
        graph = self._run(reel.span, kept)
        self._keep(kept, graph)
        return graph.output.detach()

    def backward(self, reel: Reel, number: int, gradient: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """gradient [B, T, H] of the output -> that of the hidden states, None where nobody wants it, and those of the
        session's own vectors in the order of their names, float32. It can be had once.

        `gradient` is of the `shape` of the micro-batch. Raises NotFound for a number that is not kept any more.
        """
        kept = self._find(reel, number)
        graph = kept.graph
        self._drop(reel, number)
        if graph is None:
            self.recomputed += 1
            graph = self._run(reel.span, kept)
        wanted = self._wants_inputs(reel.span, kept)
        leaves = [graph.vectors[name] for name in kept.own]
        if wanted:
            leaves.append(graph.hidden)
        grads: list[Tensor | None] = [None] * len(leaves)
        if graph.output.requires_grad and leaves:
            given = gradient.to(graph.output.device, graph.output.dtype)
            grads = list(torch.autograd.grad(graph.output, leaves, given, allow_unused=True))
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        inputs = filled.pop() if wanted else None
        return inputs, [grad.float() for grad in filled]

    def shape(self, reel: Reel, number: int) -> tuple[int, int, int]:
        """[B, T, H] of a micro-batch. Raises NotFound when it is not kept any more."""
        rows, tokens, width = self._find(reel, number).hidden.shape
        return rows, tokens, width

    def forget(self, reel: Reel) -> None:
        for number in list(reel.kept):
            self._drop(reel, number)

    def _find(self, reel: Reel, number: int) -> _Kept:
        if number not in reel.kept:
            raise NotFound(f"Micro-batch {number} is not kept here any more.", "Send it again.")
        return reel.kept[number]

    def _wants_inputs(self, span: Span, kept: _Kept) -> bool:
        return span.start > 0 or kept.microbatch.inputs

    def _run(self, span: Span, kept: _Kept) -> _Graph:
        saved: dict[int, int] = {}
        lent = self._weights | {tensor.untyped_storage().data_ptr() for tensor in kept.state.values()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in lent:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = kept.hidden.to(self._stage.device, self._stage.dtype)
            hidden = hidden.detach().requires_grad_(self._wants_inputs(span, kept))
            vectors = {name: kept.state[name].detach().requires_grad_(True) for name in kept.own}
            note = kept.microbatch
            output = self._stage.forward(
                hidden,
                None,
                span,
                position_ids=note.positions,
                attention_mask=None if note.mask is None else note.mask.long(),
                vectors={**kept.state, **vectors},
            )
        return _Graph(hidden, vectors, output, sum(saved.values()))

    def _keep(self, kept: _Kept, graph: _Graph) -> None:
        """Room is made for the newest: its gradients come first, as a rule."""
        while self._graphs and self.held_bytes + graph.size > self._max_bytes:
            self._drop_graph(next(iter(self._graphs)))
        if self.held_bytes + graph.size <= self._max_bytes:
            kept.graph = graph
            self._graphs[kept] = None
            self._graph_bytes += graph.size

    def _drop_graph(self, kept: _Kept) -> None:
        if kept.graph is not None:
            self._graph_bytes -= kept.graph.size
            kept.graph = None
            del self._graphs[kept]

    def _drop(self, reel: Reel, number: int) -> None:
        kept = reel.kept.pop(number, None)
        if kept is not None:
            self._drop_graph(kept)
            self._input_bytes -= _size(kept.hidden)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
