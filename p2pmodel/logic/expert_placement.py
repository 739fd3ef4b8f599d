"""Which experts a node should host, and when it should swap some: those that are asked most get more hosts.

An expert is as fast as its hosts together, and how often it is asked they say in their leases. Its heat is the one over
the other: pairs a second that are asked of it, by pairs a second that it could be given. A peer's throughput is spread
over its experts, as a layer's host's is over its span. The node that joins takes the hottest experts, those that nobody
hosts first: no other choice of as many leaves the heats of all, sorted, lower.

A node that chose for itself goes on looking. What keeps nodes from running to and fro, and every expert hosted:

- An expert is given up only where another peer has it, keeps it, and keeps up with the head (`keeping_up`).
- One is swapped only for another that is WORTH_MOVING times as hot as it will itself be. So the hotter of the two
  becomes cooler; as long as demand stays the same, swaps end, and none is ever taken back. Where hosts are hardly
  busy, nothing is swapped.
- That has to have been so for PATIENCE_SECONDS, and the node has to have stayed for STAY_SECONDS; an expert that nobody
  hosts is taken sooner. Each node then waits for a time drawn from its id, so that they do not go together.
- Whoever swaps says so in its lease (`coming`, `going`), and looks again before it loads and when it has: of two
  that decided at the same moment, the one whose draw is lower goes.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, log2

from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.experts import MAX_SWAPPED, ExpertLease, describe, rate_at
from p2pmodel.domain.ids import PeerId
from p2pmodel.logic.keeping_up import Heads
from p2pmodel.logic.placement import draw
from p2pmodel.logic.relocation import (
    CALM_SLOT_SECONDS,
    PATIENCE_SECONDS,
    SLOT_SECONDS,
    STAY_BEFORE_HOLE_SECONDS,
    STAY_SECONDS,
    WORTH_MOVING,
)

LEAST_DEMAND = 0.1
"""Of the mean: what an expert that is hardly asked counts as, so that it is not left with one host for ever."""

LEAST_BUSY = 0.01
"""The share of their time that an expert takes of its hosts, in all layers, from which on another host is worth a
reload: below, nobody waits for it, and how often it was asked lately is chance."""


class ExpertSupply:
    """What leases, one a peer, add up to for `count` experts of some layers. By expert: demand, in pairs a second and
    layer, where it is highest; rates, in pairs a second, and hosts, both where they are least; keepers: hosts that
    have it now and do not give it up. A peer that swaps counts as a host of what it takes."""

    def __init__(
        self, leases: Iterable[ExpertLease], layers: Sequence[int], count: int, without: Collection[PeerId] = ()
    ) -> None:
        """without: peers that count as if they hosted nothing; what was asked of them is still asked."""
        there = sorted((lease for lease in leases if not lease.leaving), key=lambda lease: lease.peer)
        alike = {tuple(lease.peer for lease in there if layer in lease.span): layer for layer in layers}
        sums = [_Sums(there, layer, count, without) for layer in alike.values()]
        self.count, self.layers = count, len(layers)
        self.rates = [min(values) for values in zip(*(one.rates for one in sums), strict=True)]
        self.hosts = [min(values) for values in zip(*(one.hosts for one in sums), strict=True)]
        self.keepers = [min(values) for values in zip(*(one.keepers for one in sums), strict=True)]
        asked = [max(values) for values in zip(*(one.demand for one in sums), strict=True)]
        least = LEAST_DEMAND * sum(asked) / count
        self.demand = [max(one, least) if least else 1.0 for one in asked]

    @property
    def unhosted(self) -> list[int]:
        return [expert for expert, hosts in enumerate(self.hosts) if not hosts]

    def heat(self, expert: int) -> float:
        rate = self.rates[expert]
        return self.demand[expert] / rate if rate else inf


class _Sums:
    """Of the leases on one layer."""

    def __init__(self, leases: Sequence[ExpertLease], layer: int, count: int, without: Collection[PeerId]) -> None:
        self.rates, self.demand = [0.0] * count, [0.0] * count
        self.hosts, self.keepers = [0] * count, [0] * count
        for lease in leases:
            if layer not in lease.span:
                continue
            for expert, load in zip(lease.experts, lease.loads, strict=False):
                if expert < count:
                    self.demand[expert] += rate_at(load)
            if lease.peer in without:
                continue
            kept = [expert for expert in lease.experts if expert not in lease.going]
            gain = 1 / (lease.pair_seconds * len(lease.experts))
            for expert in (*kept, *lease.coming):
                if expert < count:
                    self.rates[expert] += gain
                    self.hosts[expert] += 1
            for expert in kept:
                if expert < count:
                    self.keepers[expert] += 1


def choose_experts(
    leases: Sequence[ExpertLease],
    layers: Sequence[int],
    count: int,
    capacity: int,
    *,
    salt: str = "",
    heads: Heads | None = None,
) -> tuple[tuple[int, ...], str]:
    """At most `capacity` of the `count` experts of each of `layers` that a node should serve, and why, in a sentence.

    leases: of one model, not expired, without the node's own; with `heads`, those that do not keep up say what is asked
    and host nothing. Of experts that are equally hot it takes some that lie side by side; with a `salt`, such as the
    peer's id, nodes that join at once take different ones.
    Raises UsageError when the capacity holds no expert.
    """
    if capacity < 1:
        raise UsageError("This machine has no room for a single expert.", "Give it more memory, or join to watch only.")
    supply = ExpertSupply(leases, layers, count, _behind(leases, heads))
    size = min(capacity, count)
    first = size * int(draw(salt) * -(-count // size)) if salt else 0
    ranked = sorted(range(count), key=lambda expert: (-supply.heat(expert), (expert - first) % count))
    chosen = tuple(sorted(ranked[:size]))
    return chosen, _reason(supply, chosen)


@dataclass(frozen=True)
class ExpertResidence:
    """A node with its experts. since: when it came to have these; empty_since: since when it sees experts that nobody
    hosts and that it could take; hot_since: since when a swap would have been worth it."""

    peer: PeerId
    experts: tuple[int, ...]
    since: float
    empty_since: float | None = None
    hot_since: float | None = None


@dataclass(frozen=True)
class ExpertSwap:
    """coming: as many as going, both sorted; and why: a sentence without its end."""

    coming: tuple[int, ...]
    going: tuple[int, ...]
    reason: str

    def after(self, experts: Collection[int]) -> tuple[int, ...]:
        return tuple(sorted({*experts, *self.coming} - set(self.going)))


@dataclass(frozen=True)
class ExpertOutlook:
    """What comes of a look: the residence to look from the next time, and the swap to make now, if any."""

    residence: ExpertResidence
    swap: ExpertSwap | None = None


def look(
    residence: ExpertResidence,
    leases: Sequence[ExpertLease],
    layers: Sequence[int],
    count: int,
    now: float,
    heads: Heads | None = None,
) -> ExpertOutlook:
    """`leases`: all that are valid now; the node's own may be among them. heads: as in `choose_experts`."""
    others = ExpertSupply(leases, layers, count, {residence.peer, *_behind(leases, heads)})
    filling = _fill(residence, others)
    if filling:
        since = now if residence.empty_since is None else residence.empty_since
        residence = replace(residence, empty_since=since, hot_since=None)
        rivals = len(leases) * len(filling.coming) / max(1, len(set(others.unhosted) - set(residence.experts)))
        due = since + SLOT_SECONDS * _slots(residence.peer, filling, rivals)
        due = max(due, residence.since + STAY_BEFORE_HOLE_SECONDS)
        return ExpertOutlook(residence, filling if due <= now else None)
    cooling = _cool(residence, others)
    if cooling is None:
        return ExpertOutlook(replace(residence, empty_since=None, hot_since=None))
    since = now if residence.hot_since is None else residence.hot_since
    residence = replace(residence, empty_since=None, hot_since=since)
    wait = PATIENCE_SECONDS + CALM_SLOT_SECONDS * _slots(residence.peer, cooling, len(leases))
    due = max(residence.since + STAY_SECONDS, since + wait)
    return ExpertOutlook(residence, cooling if due <= now else None)


def still_good(
    residence: ExpertResidence,
    swap: ExpertSwap,
    leases: Sequence[ExpertLease],
    layers: Sequence[int],
    count: int,
    heads: Heads | None = None,
) -> bool:
    """Whether the node, which said that it makes the swap, still should, now that others may have said the same. Of
    these it gives way to those whose draw is lower, and counts on the others to do so."""
    mine = draw(f"{residence.peer} {swap.coming}")
    settled = [
        replace(lease, coming=(), going=()) if draw(f"{lease.peer} {lease.coming}") > mine else lease
        for lease in leases
    ]
    others = ExpertSupply(settled, layers, count, {residence.peer, *_behind(leases, heads)})
    if not all(others.keepers[expert] for expert in swap.going):
        return False
    return any(not others.hosts[expert] for expert in swap.coming) or _is_worth_it(
        others, sorted(swap.coming, key=others.heat, reverse=True), sorted(swap.going, key=others.heat)
    )


def _behind(leases: Iterable[ExpertLease], heads: Heads | None) -> set[PeerId]:
    return set() if heads is None else {lease.peer for lease in leases if not heads.keeps_up(lease)}


def _fill(residence: ExpertResidence, others: ExpertSupply) -> ExpertSwap | None:
    """Takes experts that nobody hosts for those that are needed least here."""
    empty = [expert for expert in others.unhosted if expert not in residence.experts]
    spare = _spare(residence, others)
    size = min(len(empty), len(spare), MAX_SWAPPED)
    if not size:
        return None
    first = int(draw(residence.peer) * len(empty))
    coming = [*empty[first:], *empty[:first]][:size]
    why = f"expert{'' if len(coming) == 1 else 's'} {describe(sorted(coming))} {_is_are(coming)} served by nobody"
    return ExpertSwap(tuple(sorted(coming)), tuple(sorted(spare[:size])), why)


def _cool(residence: ExpertResidence, others: ExpertSupply) -> ExpertSwap | None:
    """Takes the hottest experts for the coolest, pair by pair as long as it is worth it."""
    wanted = sorted(
        (expert for expert in range(others.count) if expert not in residence.experts),
        key=lambda expert: (-others.heat(expert), expert),
    )
    coming: list[int] = []
    going: list[int] = []
    for come, go in zip(wanted[:MAX_SWAPPED], _spare(residence, others), strict=False):
        if others.heat(come) * others.layers < LEAST_BUSY or not _is_worth_it(others, (come,), (go,)):
            break
        coming.append(come)
        going.append(go)
    if not coming:
        return None
    return ExpertSwap(tuple(sorted(coming)), tuple(sorted(going)), _reason(others, coming))


def _spare(residence: ExpertResidence, others: ExpertSupply) -> list[int]:
    """Those that others keep, the coolest first."""
    kept = [expert for expert in residence.experts if expert < others.count and others.keepers[expert]]
    return sorted(kept, key=lambda expert: (others.heat(expert), expert))


def _is_worth_it(others: ExpertSupply, coming: Sequence[int], going: Sequence[int]) -> bool:
    """coming: the hottest first; going: the coolest."""
    return all(others.heat(come) >= WORTH_MOVING * others.heat(go) for come, go in zip(coming, going, strict=True))


def _reason(supply: ExpertSupply, experts: Sequence[int]) -> str:
    """Why they are worth serving, in a sentence without its end."""
    if not any(supply.hosts):
        return "nobody serves experts of this model yet"
    empty = [expert for expert in experts if not supply.hosts[expert]]
    if empty:
        return f"expert{'' if len(empty) == 1 else 's'} {describe(empty)} {_is_are(empty)} served by nobody"
    hottest = max(experts, key=lambda expert: (supply.heat(expert), -expert))
    hosts = supply.hosts[hottest]
    return f"expert {hottest} is asked most for its {hosts} host{'' if hosts == 1 else 's'}"


def _is_are(some: Sequence[int]) -> str:
    return "is" if len(some) == 1 else "are"


def _slots(peer: PeerId, swap: ExpertSwap, rivals: float) -> float:
    """How many slots a peer waits, so that of `rivals` about one goes at once, and as many again in each slot."""
    return log2(1 + draw(f"{peer} {swap.coming}") * max(rivals, 1.0))
