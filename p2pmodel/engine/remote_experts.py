"""The trunk's side of experts that are elsewhere: modules that hand rows over and take weighted sums back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p2pmodel.domain.ids import VersionId
from p2pmodel.engine import family
from p2pmodel.engine.expert_layout import experts_in, find_experts


@dataclass(eq=False)
class ForwardContext:
    """What one forward has asked of others. version: of the experts, None for the base; may_spread:
    whether policy may do without experts that nobody hosts, which gradients can't; spread [T]: how many gates of
    each row were spread over others because nobody hosts their experts, None for none."""

    version: VersionId | None = None
    may_spread: bool = True
    spread: Tensor | None = None

    def note_spread(self, gates: Tensor) -> None:
        """gates [T], of one layer."""
        self.spread = gates if self.spread is None else self.spread + gates


_context: ContextVar[ForwardContext | None] = ContextVar("of the forward that runs in this thread", default=None)


def _nothing() -> None:
    """There is nothing else to compute."""


class RemoteExperts(Protocol):
    """Brings rows to their experts. Shapes: T rows, K experts a row, H the width of the model."""

    def sums(
        self,
        layer: int,
        rows: Tensor,
        experts: Tensor,
        gates: Tensor,
        context: ForwardContext,
        meanwhile: Callable[[], object] = _nothing,
    ) -> Tensor:
        """rows [T, H], experts [T, K] int64, gates [T, K]: the sum of each row's parts [T, H], float32. A row that is
        not finite makes its own sum NaN. meanwhile: called once all is on its way, before the answers are waited for.
        Raises P2PModelError."""

    def gradients(
        self, layer: int, rows: Tensor, experts: Tensor, gates: Tensor, outer: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """Of rows [T, H] and gates [T, K], from those of the sum, outer [T, H]; float32. Raises P2PModelError."""


@contextmanager
def serving(version: VersionId | None, *, may_spread: bool = True) -> Iterator[ForwardContext]:
    """Forwards in this thread ask experts of this version meanwhile."""
    context = ForwardContext(version, may_spread)
    token = _context.set(context)
    try:
        yield context
    finally:
        _context.reset(token)


@dataclass(eq=False)
class Switchboard:
    """What the modules of a trunk ask: nothing while the trunk tries itself out, when experts give zeros."""

    remote: RemoteExperts | None = None
    counts: dict[int, int] = field(default_factory=dict)
    """Layer -> how many experts it has elsewhere."""
    paths: list[str] = field(default_factory=list)
    """Of these modules, below the base model."""


class ExpertProxy(nn.Module):
    """In place of a module behind transformers' experts interface, and called as the interface says."""

    def __init__(self, like: nn.Module, layer: int, board: Switchboard) -> None:
        super().__init__()
        family.copy_plain_attributes(like, self)
        self.layer = layer
        self.board = board
        self.beside: Beside | None = None
        board.counts[layer] = experts_in(like)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, K] -> [T, H]."""
        remote = self.board.remote
        if remote is None:
            if self.beside is not None:
                self.beside.expect(hidden_states)
            return torch.zeros_like(hidden_states)
        context = _context.get() or ForwardContext()
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            total: Tensor = _Differentiable.apply(  # type: ignore[no-untyped-call]
                hidden_states, top_k_index, top_k_weights, remote, self.layer, context
            )
            return total
        meanwhile = partial(self.beside.compute, hidden_states) if self.beside else _nothing
        sums = remote.sums(self.layer, hidden_states, top_k_index, top_k_weights, context, meanwhile)
        return sums.to(hidden_states)


class Beside:
    """A shared expert of the same block. Where the family runs it on the same rows after the remote ones, which the
    trunk's trial shows, it is computed while these are under way, and its output kept for the family's own call."""

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._follows = False
        module.forward = self._recall

    def expect(self, rows: Tensor) -> None:
        """During the trial: these go to the remote ones."""
        self._kept = rows, None

    def compute(self, rows: Tensor) -> None:
        if self._follows:
            self._kept = rows, self._forward(rows)

    def _recall(self, rows: Tensor) -> Any:
        kept, self._kept = self._kept, None
        # What is kept is referred to, so its memory is nobody else's.
        if kept is None or kept[0].data_ptr() != rows.data_ptr() or kept[0].numel() != rows.numel():
            return self._forward(rows)
        if kept[1] is None:
            self._follows = True
            return self._forward(rows)
        return kept[1].view(*rows.shape[:-1], kept[1].shape[-1])


def send_away(base: nn.Module, stack: str, layers: Any, board: Switchboard) -> None:
    """Puts an ExpertProxy in place of the experts of every one of `layers`."""
    for layer, path in find_experts(base, stack).items():
        if layer in layers:
            parent, _, leaf = path.rpartition(".")
            block = base.get_submodule(parent)
            board.paths.append(path)
            setattr(block, leaf, ExpertProxy(block.get_submodule(leaf), layer, board))


def overlap_shared(base: nn.Module) -> None:
    """Shared experts are computed while rows are under way, once weights are loaded."""
    for block in list(base.modules()):
        children = dict(block.named_children())
        proxy = next((child for child in children.values() if isinstance(child, ExpertProxy)), None)
        shared = [child for name, child in children.items() if name.startswith("shared") and not name.endswith("gate")]
        if proxy is not None and len(shared) == 1:
            proxy.beside = Beside(shared[0])


class _Differentiable(torch.autograd.Function):
    """Gradients come from where the experts are, which compute once more for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, experts: Tensor, gates: Tensor, *how: Any) -> Tensor:
        remote, layer, context = how
        ctx.save_for_backward(rows, experts, gates)
        ctx.how = how
        total: Tensor = remote.sums(layer, rows, experts, gates, context)
        return total.to(rows)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        rows, experts, gates = ctx.saved_tensors
        remote, layer, context = ctx.how
        of_rows, of_gates = remote.gradients(layer, rows, experts, gates, outer[0], context)
        return of_rows.to(rows), None, of_gates.to(gates), None, None, None
