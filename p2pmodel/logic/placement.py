"""Which layers a node should host: those that raise the swarm's weakest throughput most.

A request passes every layer, so a swarm is as fast as its slowest one. A peer's throughput is spread over its span:
each of its layers counts 1 / (seconds per layer · layers). As in Petals (Borzunov et al., 2022, appendix), the
throughputs of all layers, sorted, are compared one after another: first the weakest, then the next weakest.
"""

import hashlib
from collections.abc import Sequence
from statistics import median

from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.swarm import Lease, Span
from p2pmodel.logic.routing import uncovered

WORTH_MOVING = 1.25
"""How many times the weakest throughput has to become for a reload to be worth it: below, the noise of measurements
would keep peers on the move."""


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
    rates = _throughput(leases, layers)
    seconds = layer_seconds or median([lease.layer_seconds for lease in leases] or [1.0])
    gain = 1 / (seconds * size)
    spans = [Span(start, start + size) for start in range(layers - size + 1)]
    quality = {span: _quality(rates, span, gain) for span in spans}
    best = max(quality.values())
    good = [span for span in spans if quality[span] == best]
    apart = [good[0]]
    for span in good[1:]:
        if span.start >= apart[-1].end:
            apart.append(span)
    chosen = apart[int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8]) % len(apart)] if salt else good[0]
    return chosen, _reason(leases, layers, chosen, rates)


def better_span(leases: Sequence[Lease], layers: int, own: Lease, capacity: int) -> tuple[Span, str] | None:
    """Where the node of lease `own` should move, and why; None when it should stay.

    It moves to serve layers that nobody serves, if it leaves none behind, or when the weakest throughput becomes
    WORTH_MOVING times what it is.
    """
    others = [lease for lease in leases if lease.peer != own.peer]
    span, reason = choose_span(others, layers, capacity, layer_seconds=own.layer_seconds)
    if span == own.span:
        return None
    rates = _throughput(others, layers)
    now = _quality(rates, own.span, 1 / (own.layer_seconds * len(own.span)))
    then = _quality(rates, span, 1 / (own.layer_seconds * len(span)))
    if now[0]:
        return (span, reason) if then[0] >= WORTH_MOVING * now[0] else None
    return (span, reason) if then.count(0.0) < now.count(0.0) else None


def _throughput(leases: Sequence[Lease], layers: int) -> list[float]:
    rates = [0.0] * layers
    for lease in sorted((lease for lease in leases if not lease.leaving), key=lambda lease: (lease.peer, lease.span)):
        for layer in range(lease.span.start, min(lease.span.end, layers)):
            rates[layer] += 1 / (lease.layer_seconds * len(lease.span))
    return rates


def _quality(rates: Sequence[float], span: Span, gain: float) -> list[float]:
    """The throughputs of all layers with a peer at `span` added, the weakest first: of two, the greater is better."""
    return sorted(rate + gain if layer in span else rate for layer, rate in enumerate(rates))


def _reason(leases: Sequence[Lease], layers: int, span: Span, rates: Sequence[float]) -> str:
    free = uncovered(leases, layers)
    if free == (Span(0, layers),):
        return "nobody serves this model yet"
    holes = [
        Span(max(hole.start, span.start), min(hole.end, span.end))
        for hole in free
        if hole.start < span.end and span.start < hole.end
    ]
    if holes:
        one = len(holes) == 1 and len(holes[0]) == 1
        return f"layer{'' if one else 's'} {', '.join(map(str, holes))} {'is' if one else 'are'} served by nobody"
    weakest = min(rates[span.start : span.end])
    at = rates.index(weakest, span.start)
    peers = len({lease.peer for lease in leases if not lease.leaving and at in lease.span})
    return f"layer {at} is the slowest, with {peers} peer{'' if peers == 1 else 's'}"
