"""The way of a token through the swarm: which peer runs which layers, for the least expected time.

A token passes a link from the client to the first hop, one between each hop and the next, and one back to the client.
Each layer costs the measured time of its peer, times one more than the sessions that the peer computes for. The caller
passes leases of one model that have not expired.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heappop, heappush, nsmallest
from itertools import groupby
from math import inf

from p2pmodel.domain.errors import Unreachable
from p2pmodel.domain.ids import PeerId, VersionId, short
from p2pmodel.domain.swarm import Hop, Lease, Route, Span

DEFAULT_DELAY = 0.05
"""Seconds one way on a link that nobody has measured: a pessimist's guess, so that known links come first."""

_MOST_WORK = 40_000
_MOST_BRANCHES = 200
_DIVE = 60
_NARROW = 4
_NEARLY = (1.02, 1.1, inf)
_ROUNDING = 1e-9

_Offers = tuple[Mapping[PeerId, float], ...]  # per layer: who may run it, and its seconds there
_Path = tuple[PeerId, ...]  # per layer: who runs it


class _Links:
    """Seconds one way between peers, and between the client and a peer.

    Where both ends have measured a link the larger figure counts, so that no peer makes itself near by its own word.
    """

    def __init__(
        self, leases: Iterable[Lease], offers: _Offers, client: Mapping[PeerId, float] | None, default: float
    ) -> None:
        self._client, self.default = client or {}, default
        there = {peer for offer in offers for peer in offer}
        self.known: dict[PeerId, dict[PeerId, float]] = {peer: {} for peer in there}
        for lease in leases:
            for other, seconds in lease.delays:
                if lease.peer in there and other in there and lease.peer != other:
                    measured = max(seconds, self.known[other].get(lease.peer, 0.0))
                    self.known[lease.peer][other] = self.known[other][lease.peer] = measured
        self.least = {peer: min(default, min(known.values(), default=default)) for peer, known in self.known.items()}
        """By peer, of its fastest link."""

    def client(self, peer: PeerId) -> float:
        return self._client.get(peer, self.default)

    def between(self, one: PeerId, other: PeerId) -> float:
        return self.known[one].get(other, self.default)


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

    delays: seconds one way between the client and a peer, as far as measured; those between peers are in their leases;
    default_delay: where nobody has measured. A peer may run less than its lease covers. None is met twice unless
    nothing else reaches the end. The same leases give the same route, in whatever order they come.
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
    path = _without_return(offers, _Links(leases, offers, delays, default_delay))
    hops, at = [], 0
    for peer, run in groupby(path):
        end = at + len(list(run))
        hops.append(Hop(peer, Span(at, end)))
        at = end
    return Route(tuple(hops))


def coverage(leases: Sequence[Lease], layers: int, version: VersionId | None = None) -> tuple[int, ...]:
    """How many peers serve each layer, at `version` or, without one, at any."""
    return tuple(len(offer) for offer in _offers(leases, layers, version))


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


def _without_return(offers: _Offers, links: _Links) -> _Path:
    """The best path on which no peer comes back after another; the best of all when there is none.

    Where there are many offers, those are tried first that lie on a path nearly as fast as the best one.
    """
    best = _shortest(offers, links)
    assert best is not None
    (seconds, _), path = best
    if _return(path) is None:
        return path
    for bound in (factor * seconds for factor in _NEARLY):
        straight = _branch(_within(offers, links, bound), links, bound)
        if straight is not None:
            return straight
    return path


def _within(offers: _Offers, links: _Links, bound: float) -> _Offers:
    """Without the offers through which no path takes `bound` seconds or less."""
    ahead, behind = _ahead(offers, links), _ahead(offers[::-1], links)[::-1]
    return tuple(
        {peer: seconds for peer, seconds in offer.items() if before[peer] + seconds + after[peer] <= bound}
        for offer, before, after in zip(offers, behind, ahead, strict=True)
    )


def _branch(offers: _Offers, links: _Links, bound: float) -> _Path | None:
    """The best path without return of at most `bound` seconds.

    Best first over subproblems. Where the best path of one goes p … q … p, a path without return either has p at a
    layer of q's, or has p on one side of it only: three smaller problems. It rarely takes more than a few. Where it
    would take too long, the best of the three is followed until there is no return, which is near to the best.
    """
    best = _shortest(offers, links)
    if best is None:
        return None
    most = min(_MOST_BRANCHES, _MOST_WORK // sum(map(len, offers)))
    queue, made, deep = [(0, best[0], 0, best[1], offers)], 1, 0
    while queue and made <= most + _DIVE:
        _, cost, _, path, within = heappop(queue)
        if cost[0] > bound:
            continue
        back = _return(path)
        if back is None:
            return path
        peer, gap = back
        deep -= made >= most
        for smaller in (
            _keep(within, peer, range(gap + 1, len(path))),
            _keep(within, peer, range(gap)),
            _force(within, peer, gap),
        ):
            found = _shortest(smaller, links)
            if found is not None:
                heappush(queue, (deep, found[0], made, found[1], smaller))
                made += 1
    return None


def _shortest(offers: _Offers, links: _Links) -> tuple[tuple[float, int], _Path] | None:
    """The shortest path over (layer, peer), its (seconds, hops) first; None when a layer has no offer.

    The graph has no way back to a lower layer, so taking the layers in order is Dijkstra's algorithm without its queue.
    What cannot be better than a path already found is not followed: first a narrow search finds a good one.
    """
    if not all(offers):
        return None
    ahead = _ahead(offers, links)
    (seconds, _), _ = _search(offers, links, ahead, inf, _NARROW)
    return _search(offers, links, ahead, seconds * (1 + _ROUNDING), None)


def _ahead(offers: _Offers, links: _Links) -> list[dict[PeerId, float]]:
    """Per layer and peer, a lower bound of the seconds from behind that layer to the client: as if the link to a peer
    were as fast as its fastest, wherever one comes from."""
    ahead = [{peer: links.client(peer) for peer in offers[-1]}]
    for offer in reversed(offers[1:]):
        after = ahead[-1]
        enter = min(links.least[peer] + seconds + after[peer] for peer, seconds in offer.items())
        here = offers[len(offers) - len(ahead) - 1]
        ahead.append({p: min(enter, offer[p] + after[p]) if p in offer else enter for p in here})
    return ahead[::-1]


def _search(
    offers: _Offers, links: _Links, ahead: Sequence[Mapping[PeerId, float]], bound: float, width: int | None
) -> tuple[tuple[float, int], _Path]:
    """The shortest path among those of at most `bound` seconds; with a width, of those that look best at each layer."""
    reached = {peer: (links.client(peer) + seconds, 1) for peer, seconds in offers[0].items()}
    came_from: list[dict[PeerId, PeerId]] = []
    for layer, offer in enumerate(offers):
        rest = ahead[layer]
        if layer:
            ranked = sorted((seconds, hops, peer) for peer, (seconds, hops) in reached.items())
            here: dict[PeerId, tuple[float, int]] = {}
            before: dict[PeerId, PeerId] = {}
            most = bound - ranked[0][0]
            for peer, seconds in offer.items():
                stayed = reached.get(peer)
                if stayed is None and links.least[peer] + seconds + rest[peer] > most:
                    continue
                limit = bound - seconds - rest[peer]
                best = _cheapest_switch(peer, min(limit, stayed[0]) if stayed else limit, reached, ranked, links)
                if best is not None and (stayed is None or best[:2] < stayed):
                    here[peer], before[peer] = (best[0] + seconds, best[1]), best[2]
                elif stayed is not None:
                    here[peer], before[peer] = (stayed[0] + seconds, stayed[1]), peer
            reached = here
            came_from.append(before)
        reached = {peer: cost for peer, cost in reached.items() if cost[0] + rest[peer] <= bound}
        if width is not None and len(reached) > width:
            look = nsmallest(width, ((cost[0] + rest[peer], cost[1], peer) for peer, cost in reached.items()))
            reached = {peer: reached[peer] for _, _, peer in look}
    cost, peer = min(((s + links.client(peer), hops), peer) for peer, (s, hops) in reached.items())
    path = [peer]
    for before in reversed(came_from):
        path.append(before[path[-1]])
    return cost, tuple(reversed(path))


def _cheapest_switch(
    peer: PeerId,
    limit: float,
    reached: Mapping[PeerId, tuple[float, int]],
    ranked: Sequence[tuple[float, int, PeerId]],
    links: _Links,
) -> tuple[float, int, PeerId] | None:
    """(seconds, hops, from whom) of the best way to `peer` from another; None when all take longer than `limit`.
    `ranked` is `reached`, the cheapest first."""
    best: tuple[float, int, PeerId] | None = None
    known, least = links.known[peer], links.least[peer]
    for seconds, hops, other in ranked:
        if seconds + least > limit:
            break
        total = seconds + known.get(other, links.default)
        if total <= limit and other != peer:
            way = (total, hops + 1, other)
            if best is None or way < best:
                best, limit = way, total
    return best


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
