"""When a node that chose its layers itself moves to others: to fill a hole, or to strengthen the slowest layer.

All nodes see the same leases, so all see the same hole, and none may ask another. What keeps them from running there
together, or from running to and fro:

- Each waits for a time drawn from its id and the hole, so that of n nodes that could go, about as many as are needed
  go at once, and twice as many in each SLOT_SECONDS after that, as long as the hole is there.
- Whoever goes says so in its lease (`moving`) before it loads anything, and counts there from then on.
- Before it loads, and when it has, it looks again, and stays after all if that would now be better: of two that decided
  at the same moment, the one whose draw is lower goes.
- Without a hole, a node moves only when the slowest layer becomes WORTH_MOVING times faster, has been so slow for
  PATIENCE_SECONDS, and the node has stayed for STAY_SECONDS.
- A node that would leave a hole behind goes only to a larger one, when for LAST_RESORT_SECONDS nobody else has.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf, log2

from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import LEASE_SECONDS, Lease, Span
from p2pmodel.logic.placement import Layers, Supply, best_span, draw, reason, runs

WORTH_MOVING = 1.25
"""How many times the weakest throughput has to become for a reload to be worth it: below, the noise of measurements
would keep peers on the move."""
SLOT_SECONDS = 2.0
"""In which a lease that says `moving` reaches whoever looks."""
CALM_SLOT_SECONDS = LEASE_SECONDS
"""The same where there is no hurry: until what a move changed shows in everybody's figures."""
PATIENCE_SECONDS = 2 * LEASE_SECONDS
STAY_SECONDS = 10 * LEASE_SECONDS
STAY_BEFORE_HOLE_SECONDS = LEASE_SECONDS / 3
LAST_RESORT_SECONDS = LEASE_SECONDS
CONFIRM_SECONDS = SLOT_SECONDS
"""From a node's word that it moves to its next look: by then the words of others have arrived."""


@dataclass(frozen=True)
class Residence:
    """A node on its span. capacity: the most layers that it can hold; since: when it came there; needs: the holes that
    it sees, and since when; slow_since: since when a move would have been worth it, without a hole."""

    peer: PeerId
    span: Span
    layer_seconds: float
    capacity: int
    since: float
    needs: tuple[tuple[Span, float], ...] = ()
    slow_since: float | None = None


@dataclass(frozen=True)
class Move:
    """To `span`, and why: a sentence without its end."""

    span: Span
    reason: str


@dataclass(frozen=True)
class Outlook:
    """What comes of a look: the residence to look from the next time, the move to make now if any, and when to look
    again at the latest, even if nothing is heard."""

    residence: Residence
    move: Move | None = None
    again: float = inf


def look(residence: Residence, supply: Supply, now: float) -> Outlook:
    """`supply`: of all leases that are valid now; the node's own may be among them."""
    here, size = residence.span, min(residence.capacity, len(supply.peers))
    if not supply.holes and residence.peer in supply.leases and supply.reach(WORTH_MOVING) > size:
        return Outlook(replace(residence, needs=(), slow_since=None))  # the usual case: no span holds all weak layers
    others = supply.without(residence.peer)
    holes = runs(layer for layer, peers in enumerate(others.peers) if not peers and layer not in here)
    if holes:
        seen = dict(residence.needs)
        residence = replace(residence, needs=tuple((hole, seen.get(hole, now)) for hole in holes), slow_since=None)
        choices = [
            (due, move)
            for hole, since in residence.needs
            if (move := _fill(residence, others, hole, size))
            for due in (_due_at_hole(residence, supply, others, hole, since, move.span),)
        ]
        if not choices:
            return Outlook(residence)
        due, move = min(choices, key=lambda choice: choice[0])
    else:
        strengthen = _strengthen(residence, others, size)
        if strengthen is None:
            return Outlook(replace(residence, needs=(), slow_since=None))
        move, since = strengthen, now if residence.slow_since is None else residence.slow_since
        residence = replace(residence, needs=(), slow_since=since)
        wait = PATIENCE_SECONDS + CALM_SLOT_SECONDS * _slots(residence.peer, move.span, len(supply.leases))
        due = max(residence.since + STAY_SECONDS, since + wait)
    return Outlook(residence, move if due <= now else None, due)


def still_good(residence: Residence, to: Span, leases: Iterable[Lease], layers: int) -> bool:
    """Whether the node, which said that it moves `to`, still should, now that others may have said the same. Of these
    it gives way to those whose draw is lower, and counts on the others to do so."""
    mine = draw(f"{residence.peer} {to}")
    others = Supply(
        (
            replace(lease, moving=None) if lease.moving and draw(f"{lease.peer} {lease.moving}") > mine else lease
            for lease in leases
            if lease.peer != residence.peer
        ),
        layers,
    )
    return _standing(residence, others, to) > _standing(residence, others, residence.span)


def _fill(residence: Residence, others: Layers, hole: Span, size: int) -> Move | None:
    """The move that does most for the hole, if fewer layers are then served by nobody."""
    starts = range(max(0, hole.start - size + 1), min(hole.end - 1, len(others.peers) - size) + 1)
    span = best_span(others.rates, size, 1 / (residence.layer_seconds * size), starts, residence.peer)
    better = _standing(residence, others, span)[0] > _standing(residence, others, residence.span)[0]
    return Move(span, reason(others, span)) if better else None


def _due_at_hole(residence: Residence, supply: Supply, others: Layers, hole: Span, since: float, span: Span) -> float:
    needed = -(-len(hole) // len(span))
    wait = SLOT_SECONDS * _slots(residence.peer, hole, supply.spare / needed)
    if any(not others.peers[layer] and layer not in span for layer in range(residence.span.start, residence.span.end)):
        wait += LAST_RESORT_SECONDS
    return max(residence.since + STAY_BEFORE_HOLE_SECONDS, since + wait)


def _strengthen(residence: Residence, others: Layers, size: int) -> Move | None:
    """The move that makes the slowest layer faster, if it is worth it."""
    enough = WORTH_MOVING * _standing(residence, others, residence.span)[1]
    weak = [layer for layer, rate in enumerate(others.rates) if rate < enough]
    if not weak or weak[-1] - weak[0] >= size:
        return None
    starts = range(max(0, weak[-1] - size + 1), min(weak[0], len(others.peers) - size) + 1)
    span = best_span(others.rates, size, 1 / (residence.layer_seconds * size), starts, "")
    return Move(span, reason(others, span)) if _standing(residence, others, span)[1] >= enough else None


def _standing(residence: Residence, others: Layers, span: Span) -> tuple[int, float]:
    """With the node on `span`: minus the number of layers that nobody serves, and the weakest throughput."""
    gain = 1 / (residence.layer_seconds * len(span))
    rates, unserved = others.rates, others.peers.count(0) - others.peers[span.start : span.end].count(0)
    outside = min(min(rates[: span.start], default=inf), min(rates[span.end :], default=inf))
    return -unserved, min(outside, min(rates[span.start : span.end]) + gain)


def _slots(peer: PeerId, what: Span, rivals: float) -> float:
    """How many slots a peer waits, so that of `rivals` about one goes at once, and as many again in each slot."""
    return log2(1 + draw(f"{peer} {what}") * max(rivals, 1.0))
