"""Soft merging of experts with adaptive routing (SMEAR: Muqeeth et al., 2023, arXiv:2306.03745): a router's
distribution averages the parameters of a layer's experts, and the one adapter that comes of it is computed.

    x = norm(mean over t < LEAD of norm(hₜ))             what the router sees of an example, [H]
    sₑ = scaleₑ · norm(wₑ)·x / H + biasₑ, s∅ = 0         by expert, and for the layer as it is
    p = softmax(s)
    h'ₜ = hₜ for t < LEAD;  h'ₜ = hₜ + gelu(norm(hₜ)·Dᵀ)·U,  D = Σ pₑ·Dₑ,  U = Σ pₑ·Uₑ  behind it

The decision is made once, from the first LEAD tokens of an example, and these tokens themselves pass the layer as if it
had no experts. So no token is predicted by what comes after it, whatever is scored; a prompt may come in pieces, be
replayed or go back, and the decision is the same; and what the routers see depends on no expert's parameters, in no
layer: experts come and go, and the others' scores stay.

`norm` is layer norm without parameters. It is taken of each token first, since single tokens of large norm (attention
sinks) would be all that a mean consists of. The layer as it is has a share of its own: an example that no expert is for
keeps the model that it had.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pad

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.modular import DOWN, GATE, MAX_EXPERTS, PARTS, PREFIX, ROUTER, UP, place_of

LEAD = 32
"""Tokens. scripts/bench/experts.py compares others."""
EPS = 1e-5

Decide = Callable[[Tensor], Tensor]
"""Scores [B, E + 1], the layer as it is last -> shares of the same shape."""


@dataclass(frozen=True)
class Pool:
    """The experts of one layer, E of them, sorted by name: down, up [E, r, H], zeros behind a lower rank; router
    [E, H]; gate [E, 2]."""

    names: tuple[str, ...]
    down: Tensor
    up: Tensor
    router: Tensor
    gate: Tensor

    def scores(self, seen: Tensor) -> Tensor:
        """seen [B, H]: what `seen_by_router` is -> [B, E + 1]."""
        width = seen.shape[-1]
        alike = seen @ norm(self.router).T / width
        scores = alike * self.gate[:, 0] + self.gate[:, 1]
        return pad(scores, (0, 1))

    def merged(self, shares: Tensor) -> "Adapter":
        """shares [B, E + 1]."""
        count, rank, width = self.down.shape
        weights = shares[:, :count]
        down, up = ((weights @ part.reshape(count, -1)).view(-1, rank, width) for part in (self.down, self.up))
        return Adapter(down, up)


@dataclass(frozen=True)
class Adapter:
    """One merged expert a row: down, up [B, r, H]."""

    down: Tensor
    up: Tensor

    def update(self, hidden: Tensor) -> Tensor:
        """What is added to hidden [B, T, H]; float32."""
        inner = gelu(norm(hidden.float()) @ self.down.transpose(1, 2))
        return inner @ self.up

    @classmethod
    def stacked(cls, parts: Sequence["Adapter"]) -> "Adapter":
        """One behind another, as rows of one batch."""
        if len(parts) == 1:
            return parts[0]
        rank = max(part.down.shape[1] for part in parts)
        down, up = (
            torch.cat([pad(tensor, (0, 0, 0, rank - tensor.shape[1])) for tensor in tensors])
            for tensors in ([part.down for part in parts], [part.up for part in parts])
        )
        return cls(down, up)


Pools = Mapping[str, Pool]
"""By the path of the layer."""


def norm(tensor: Tensor) -> Tensor:
    """Over the last dimension, without parameters."""
    return layer_norm(tensor, tensor.shape[-1:], eps=EPS)


def seen_by_router(lead: Tensor) -> Tensor:
    """lead [B, LEAD, H]: normalised hidden states -> [B, H]."""
    return norm(lead.mean(1))


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def is_expert(slot: str) -> bool:
    return slot.startswith(PREFIX)


def pools(state: Mapping[str, Tensor]) -> dict[str, Pool]:
    """Of the experts in a state, which has all parts of each; other slots are passed over."""
    return {layer: _pool(dict(sorted(experts.items()))) for layer, experts in _parts(state).items()}


def check_pools(state: Mapping[str, Tensor]) -> None:
    """Raises Rejected("expert") when a layer's experts are too many, or one lacks a part or has two of different
    ranks."""
    for layer, experts in _parts(state).items():
        if len(experts) > MAX_EXPERTS:
            raise Rejected(
                "expert", f"Layer {layer[:128]} would have {len(experts)} experts; {MAX_EXPERTS} are possible."
            )
        for name, parts in experts.items():
            missing = [part for part in PARTS if part not in parts]
            if missing:
                raise Rejected("expert", f"Expert {name} of layer {layer[:128]} comes without its {missing[0]}.")
            if parts[DOWN].shape != parts[UP].shape:
                raise Rejected("expert", f"Expert {name} of layer {layer[:128]} has two ranks.")


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """By layer, expert and part."""
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in state.items():
        place = place_of(name) if is_expert(name) else None
        if place is not None:
            parts.setdefault(place.layer, {}).setdefault(place.expert, {})[place.part] = tensor
    return parts


def _pool(experts: Mapping[str, Mapping[str, Tensor]]) -> Pool:
    rank = max(parts[DOWN].shape[0] for parts in experts.values())

    def stack(part: str) -> Tensor:
        return torch.stack([pad(e[part], (0, 0, 0, rank - e[part].shape[0])) for e in experts.values()])

    router, gate = (torch.stack([parts[part] for parts in experts.values()]) for part in (ROUTER, GATE))
    return Pool(tuple(experts), stack(DOWN), stack(UP), router, gate)


def beginning(pool: str, rank: int, width: int) -> Tensor:
    """[r, H]: where `down` of every expert of a pool starts from, so that averages of experts, and of two contributors'
    updates of one, are of parameters that mean the same (up starts from zeros)."""
    seed = int.from_bytes(hashlib.sha256(pool.encode()).digest()[:7], "little")
    rows = [torch.randn(width, generator=torch.Generator().manual_seed(seed + row)) for row in range(rank)]
    return torch.stack(rows) / sqrt(width)


@dataclass
class _Memory:
    """Of one layer. lead [B, LEAD, H]: normalised, as far as it has come; adapter: once no row is in its lead."""

    lead: Tensor | None = None
    adapter: Adapter | None = None


@dataclass
class Course:
    """What the routers of some layers have seen of some rows, and what they decided: of one session, or one forward.

    Before each step `begin` is told of it, then each layer asks `update`. shares: by layer, [B, E + 1], as decided
    last; fresh: the layers that decided in this step."""

    pools: Pools
    decide: Decide = softmax
    shares: dict[str, Tensor] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._memories: dict[str, _Memory] = {layer: _Memory() for layer in self.pools}
        self._real: Tensor | None = None
        self._index: Tensor | None = None
        self._start = 0
        self._tokens = 0
        self._settled = False

    def begin(self, start: int, tokens: int, mask: Tensor | None = None) -> None:
        """The next step's tokens are at [start, start + tokens), start being at most where the last one ended. mask
        [B, tokens] bool: those that are no padding."""
        self._start, self._tokens = start, tokens
        self.fresh.clear()
        if self._real is None and mask is not None and not bool(mask.all()):
            self._real = mask.new_ones(len(mask), start)
        if self._real is None:
            self._index, before = None, start
        else:
            now = self._real.new_ones(len(self._real), tokens) if mask is None else mask.bool()
            self._real = torch.cat([self._real[:, :start], now], dim=1)
            index = self._real.cumsum(1) - 1
            self._index = index.masked_fill(~self._real, -1)[:, start:]
            before = int(self._real[:, :start].sum(1).min())
        if before < LEAD:
            for memory in self._memories.values():
                memory.adapter = None

    def reorder(self, order: Tensor) -> None:
        """Each row goes on from row order[row], [B]."""
        if self._real is not None:
            self._real = self._real[order]
        for memory in self._memories.values():
            if memory.lead is not None:
                memory.lead = memory.lead[order]
            if memory.adapter is not None:
                memory.adapter = Adapter(memory.adapter.down[order], memory.adapter.up[order])
        self.shares = {layer: shares[order] for layer, shares in self.shares.items()}

    def decided(self) -> tuple[int, Tensor] | None:
        """(how many layers decided in this step, the sum of their shares [B, E + 1]); None when none did."""
        if not self.fresh:
            return None
        return len(self.fresh), torch.stack([self.shares[layer] for layer in self.fresh]).sum(0).float().cpu()

    def settled(self, layer: str) -> Adapter | None:
        """The adapter for all tokens of this step, when no row is in its lead."""
        return self._memories[layer].adapter

    def update(self, layer: str, hidden: Tensor) -> Tensor | None:
        """What is added to hidden [B, T, H], float32; None for nothing."""
        memory = self._memories[layer]
        if memory.adapter is not None:
            return memory.adapter.update(hidden)
        return self._decided(layer, memory, hidden)

    def _decided(self, layer: str, memory: _Memory, hidden: Tensor) -> Tensor | None:
        if self._index is None:
            own, end = max(0, LEAD - self._start), self._start + self._tokens
            head = norm(hidden[:, :own].float())
            parts = [head] if memory.lead is None else [memory.lead[:, : self._start], head]
            memory.lead = torch.cat(parts, dim=1) if len(parts) > 1 else head
            if end <= LEAD:
                return None
            adapter = self._route(layer, memory.lead)
            memory.adapter = adapter
            return pad(adapter.update(hidden[:, own:]), (0, 0, own, 0))
        lead, index = memory.lead, self._index
        if lead is None:
            lead = hidden.new_zeros(len(hidden), LEAD, hidden.shape[-1], dtype=torch.float32)
        elif lead.shape[1] < LEAD:  # begun by steps without padding
            lead = pad(lead, (0, 0, 0, LEAD - lead.shape[1]))
        rows, places = ((index >= 0) & (index < LEAD)).nonzero(as_tuple=True)
        memory.lead = lead.index_put((rows, index[rows, places]), norm(hidden[rows, places].float()))
        behind = index >= LEAD
        if not bool(behind.any()):
            return None
        adapter = self._route(layer, memory.lead)
        if bool((index[:, -1] >= LEAD).all()):
            memory.adapter = adapter
        return adapter.update(hidden) * behind[:, :, None]

    def _route(self, layer: str, lead: Tensor) -> Adapter:
        pool = self.pools[layer]
        shares = self.decide(pool.scores(seen_by_router(lead)))
        self.shares[layer] = shares.detach()
        self.fresh.append(layer)
        return pool.merged(shares)
