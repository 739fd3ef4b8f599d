"""Which layers a node should host: those that raise the swarm's weakest throughput most.

A request passes every layer, so a swarm is as fast as its slowest one. A peer's throughput is spread over its span:
each of its layers counts 1 / (seconds per layer · layers). As in Petals (Borzunov et al., 2022, appendix), the
throughputs of all layers, sorted, are compared one after another: first the weakest, then the next weakest.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from statistics import median

from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Lease, Span


class Layers:
    """peers: how many serve each layer; rates: their throughputs, in tokens per second."""

    def __init__(self, peers: list[int], rates: list[float]) -> None:
        self.peers, self.rates = peers, rates

    @cached_property
    def holes(self) -> tuple[Span, ...]:
        """The runs of layers that nobody serves, in order."""
        return runs(layer for layer, peers in enumerate(self.peers) if not peers)


class Supply(Layers):
    """What leases of one model, one a peer, add up to. A peer that is moving counts where it goes: whoever decides next
    has to reckon with it."""

    def __init__(self, leases: Iterable[Lease], layers: int) -> None:
        super().__init__([0] * layers, [0.0] * layers)
        there = sorted((lease for lease in leases if not lease.leaving), key=lambda lease: lease.peer)
        self.leases = {lease.peer: lease for lease in there}
        peers, rates = self.peers, self.rates
        for lease in there:
            span = lease.moving or lease.span
            rate = 1 / (lease.layer_seconds * len(span))
            for layer in range(span.start, min(span.end, layers)):
                peers[layer] += 1
                rates[layer] += rate

    def without(self, peer: PeerId) -> Layers:
        """As it would be if `peer` were not there."""
        peers, rates = self.peers.copy(), self.rates.copy()
        lease = self.leases.get(peer)
        if lease:
            span = lease.moving or lease.span
            rate = 1 / (lease.layer_seconds * len(span))
            for layer in range(span.start, min(span.end, len(peers))):
                peers[layer] -= 1
                rates[layer] = rates[layer] - rate if peers[layer] else 0.0
        return Layers(peers, rates)

    @cached_property
    def spare(self) -> int:
        """How many peers could go without leaving a hole behind, each for itself."""
        return sum(
            lease.moving is None and min(self.peers[lease.span.start : lease.span.end], default=0) > 1
            for lease in self.leases.values()
        )

    def reach(self, factor: float) -> int:
        """How many layers lie from the first to the last whose rate is less than `factor` times the weakest."""
        if factor not in self._reaches:
            most = factor * min(self.rates)
            weak = [layer for layer, rate in enumerate(self.rates) if rate < most]
            self._reaches[factor] = weak[-1] - weak[0] + 1 if weak else 0
        return self._reaches[factor]

    @cached_property
    def _reaches(self) -> dict[float, int]:
        return {}


def runs(layers: Iterable[int]) -> tuple[Span, ...]:
    """The contiguous spans that ascending layers make up."""
    spans: list[Span] = []
    for layer in layers:
        if spans and spans[-1].end == layer:
            spans[-1] = Span(spans[-1].start, layer + 1)
        else:
            spans.append(Span(layer, layer + 1))
    return tuple(spans)


def choose_span(
    leases: Sequence[Lease], layers: int, capacity: int, *, layer_seconds: float | None = None, salt: str = ""
) -> tuple[Span, str]:
    """The span of at most `capacity` layers that a node should serve, and why, in a sentence.

    leases: of one model, not expired, without the node's own; layer_seconds: the node's own, or the swarm's median.
    Of equally good spans the lowest is taken. With a `salt`, such as the peer's id, it is one of those that lie end to
    end from the lowest on, so that nodes that join at once spread without leaving gaps too small to fill.
    Raises UsageError when the capacity holds no layer.
    """
    if capacity < 1:
        raise UsageError("This machine has no room for a single layer.", "Give it more memory, or join to watch only.")
    size = min(capacity, layers)
    seconds = layer_seconds or median([lease.layer_seconds for lease in leases] or [1.0])
    supply = Supply(leases, layers)
    chosen = best_span(supply.rates, size, 1 / (seconds * size), range(layers - size + 1), salt)
    return chosen, reason(supply, chosen)


def best_span(rates: Sequence[float], size: int, gain: float, starts: range, salt: str) -> Span:
    """The span of `size` layers from one of `starts` on which a peer that adds `gain` to each of its layers raises the
    weakest of `rates` most; of equally good ones as `choose_span` says."""
    good = [starts[0]]
    for start in starts[1:]:
        order = _compare(rates, size, gain, start, good[-1])
        if order > 0:
            good = [start]
        elif order == 0:
            good.append(start)
    apart = [good[0]]
    for start in good[1:]:
        if start >= apart[-1] + size:
            apart.append(start)
    start = apart[int(draw(salt) * len(apart))] if salt else good[0]
    return Span(start, start + size)


def draw(salt: str) -> float:
    """A number in [0, 1) that looks random, and is the same wherever the salt is."""
    return int.from_bytes(hashlib.sha256(salt.encode()).digest()[:6]) / (1 << 48)


def _compare(rates: Sequence[float], size: int, gain: float, one: int, other: int) -> int:
    """Whether a peer does more (1), less (-1) or as much (0) from layer `one` on than from `other` on.

    Which of two sorted lists is the greater depends on what they do not have in common: here on the layers that only
    one of the two spans has.
    """
    apart = min(abs(one - other), size)
    low, high = (one, other) if one < other else (other, one)
    first, last = rates[low : low + apart], rates[high + size - apart : high + size]
    with_low = sorted([*(rate + gain for rate in first), *last])
    with_high = sorted([*first, *(rate + gain for rate in last)])
    order = (with_low > with_high) - (with_low < with_high)
    return order if low == one else -order


def reason(supply: Layers, span: Span) -> str:
    """Why `span` is worth serving, in a sentence without its end."""
    if not any(supply.peers):
        return "nobody serves this model yet"
    holes = runs(layer for layer in range(span.start, span.end) if not supply.peers[layer])
    if holes:
        one = len(holes) == 1 and len(holes[0]) == 1
        return f"layer{'' if one else 's'} {', '.join(map(str, holes))} {'is' if one else 'are'} served by nobody"
    at = min(range(span.start, span.end), key=lambda layer: supply.rates[layer])
    return f"layer {at} is the slowest, with {supply.peers[at]} peer{'' if supply.peers[at] == 1 else 's'}"
