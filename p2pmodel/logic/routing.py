"""The way of a token through the swarm: which peer runs which layers, for the least expected time.

A hop costs the delay of the link to its peer, and for each layer the peer's measured time, times one more than the
sessions that it has queued. The caller passes leases of one model that have not expired.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import groupby

from p2pmodel.domain.errors import Unreachable
from p2pmodel.domain.ids import PeerId, VersionId, short
from p2pmodel.domain.swarm import Hop, Lease, Route, Span

DEFAULT_DELAY = 0.05
"""Seconds to a peer that nobody has measured: a pessimist's guess, so that known links come first."""

_MOST_BRANCHES = 200

_Offers = tuple[Mapping[PeerId, float], ...]  # per layer: who may run it, and its seconds there
_Path = tuple[PeerId, ...]  # per layer: who runs it


def find_route(
    leases: Sequence[Lease],
    layers: int,
    version: VersionId,
    *,
    delays: Mapping[PeerId, float] | None = None,
    banned: Collection[PeerId] = (),
    default_delay: float = DEFAULT_DELAY,
) -> Route:
    """The route through all `layers` with the least expected seconds per token, of those the one with fewest hops.

    delays: seconds one way to a peer, as far as measured. A peer may run less than its lease covers. None is met twice
    unless nothing else reaches the end. The same leases give the same route, in whatever order they come.
    Raises Unreachable, naming the layers that nobody serves.
    """
    offers = _offers([lease for lease in leases if lease.peer not in banned], layers, version)
    missing = _spans(not offer for offer in offers)
    if missing:
        one = len(missing) == 1 and len(missing[0]) == 1
        raise Unreachable(
            f"Nobody serves layer{'' if one else 's'} {', '.join(map(str, missing))} at version {short(version)}.",
            "Join with a node that serves them, or try again: a peer that leaves is replaced within a minute.",
        )
    links = {peer: (delays or {}).get(peer, default_delay) for offer in offers for peer in offer}
    path = _without_return(offers, links)
    hops, at = [], 0
    for peer, run in groupby(path):
        end = at + len(list(run))
        hops.append(Hop(peer, Span(at, end)))
        at = end
    return Route(tuple(hops))


def expected_seconds(
    route: Route,
    leases: Sequence[Lease],
    version: VersionId,
    *,
    delays: Mapping[PeerId, float] | None = None,
    default_delay: float = DEFAULT_DELAY,
) -> float:
    """What one token is expected to take on `route`. Raises Unreachable when the leases no longer bear it."""
    offers = _offers(leases, route.hops[-1].span.end, version)
    total = 0.0
    for hop in route.hops:
        if any(hop.peer not in offers[layer] for layer in range(hop.span.start, hop.span.end)):
            raise Unreachable(f"{hop.peer} no longer serves layers {hop.span} at version {short(version)}.")
        total += (delays or {}).get(hop.peer, default_delay)
        total += sum(offers[layer][hop.peer] for layer in range(hop.span.start, hop.span.end))
    return total


def coverage(leases: Sequence[Lease], layers: int, version: VersionId | None = None) -> tuple[int, ...]:
    """How many peers serve each layer, at `version` or, without one, at any."""
    return tuple(len(offer) for offer in _offers(leases, layers, version))


def uncovered(leases: Sequence[Lease], layers: int, version: VersionId | None = None) -> tuple[Span, ...]:
    """The runs of layers that nobody serves, in order."""
    return _spans(count == 0 for count in coverage(leases, layers, version))


def _offers(leases: Sequence[Lease], layers: int, version: VersionId | None) -> _Offers:
    offers: tuple[dict[PeerId, float], ...] = tuple({} for _ in range(layers))
    for lease in leases:
        if lease.leaving or (version is not None and version not in lease.versions):
            continue
        seconds = lease.layer_seconds * (1 + lease.queue)
        for layer in range(lease.span.start, min(lease.span.end, layers)):
            offers[layer][lease.peer] = min(seconds, offers[layer].get(lease.peer, seconds))
    return offers


def _spans(marks: Iterable[bool]) -> tuple[Span, ...]:
    """The runs of marked layers."""
    runs = groupby(enumerate(marks), key=lambda item: item[1])
    marked = [[layer for layer, _ in run] for mark, run in runs if mark]
    return tuple(Span(run[0], run[-1] + 1) for run in marked)


def _without_return(offers: _Offers, links: Mapping[PeerId, float]) -> _Path:
    """The best path on which no peer comes back after another; the best of all when there is none.

    Best first over subproblems. Where the best path of one goes p … q … p, a path without return either has p at a
    layer of q's, or has p on one side of it only: three smaller problems. It rarely takes more than a few, and after
    _MOST_BRANCHES the shortest path is taken as it is.
    """
    best = _shortest(offers, links)
    assert best is not None
    queue, made = [(best[0], 0, best[1], offers)], 1
    while queue and made < _MOST_BRANCHES:
        _, _, path, within = heappop(queue)
        back = _return(path)
        if back is None:
            return path
        peer, gap = back
        for smaller in (
            _keep(within, peer, range(gap + 1, len(path))),
            _keep(within, peer, range(gap)),
            _force(within, peer, gap),
        ):
            found = _shortest(smaller, links)
            if found is not None:
                heappush(queue, (found[0], made, found[1], smaller))
                made += 1
    return best[1]


def _shortest(offers: _Offers, links: Mapping[PeerId, float]) -> tuple[tuple[float, int], _Path] | None:
    """The shortest path over (layer, peer), its (seconds, hops) first. The graph has no way back to a lower layer, so
    taking the layers in order is Dijkstra's algorithm without its queue."""
    reached: dict[PeerId, tuple[float, int]] = {}
    came_from: list[dict[PeerId, PeerId]] = []
    for layer, offer in enumerate(offers):
        start, cheapest = min(((cost, peer) for peer, cost in reached.items()), default=((0.0, 0), None))
        here: dict[PeerId, tuple[float, int]] = {}
        before: dict[PeerId, PeerId] = {}
        for peer in sorted(offer):
            if layer and cheapest is None:
                return None
            switched = (start[0] + links[peer], start[1] + 1)
            stayed = reached.get(peer)
            entry = stayed if stayed is not None and stayed <= switched else switched
            here[peer] = (entry[0] + offer[peer], entry[1])
            if cheapest is not None:
                before[peer] = peer if entry is stayed else cheapest
        reached = here
        came_from.append(before)
    if not reached:
        return None
    cost, peer = min((cost, peer) for peer, cost in reached.items())
    path = [peer]
    for before in reversed(came_from[1:]):
        path.append(before[path[-1]])
    return cost, tuple(reversed(path))


def _return(path: _Path) -> tuple[PeerId, int] | None:
    """The first peer that comes back, and the layer where it had gone."""
    left: dict[PeerId, int] = {}
    for layer, peer in enumerate(path):
        if peer in left:
            return peer, left[peer]
        if layer and path[layer - 1] != peer:
            left[path[layer - 1]] = layer
    return None


def _keep(offers: _Offers, peer: PeerId, allowed: range) -> _Offers:
    return tuple(
        offer if peer not in offer or layer in allowed else {p: s for p, s in offer.items() if p != peer}
        for layer, offer in enumerate(offers)
    )


def _force(offers: _Offers, peer: PeerId, at: int) -> _Offers:
    here = {peer: offers[at][peer]} if peer in offers[at] else {}
    return (*offers[:at], here, *offers[at + 1 :])
