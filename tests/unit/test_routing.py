"""Routes: the fastest of all that exist, in whatever order the leases come, and a clear word when there is none."""

import random
import time
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.errors import Unreachable
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import Hop, Lease, Route, Span
from p2pmodel.logic.routing import coverage, find_route
from p2pmodel.wire import canonical

MODEL = canonical.digest(b"model")
V1, V2 = (VersionId(canonical.digest(text)) for text in (b"1", b"2"))
LAYERS = 5
PEERS = [PeerId(f"12D3KooW{'A' * 43}{letter}") for letter in "BCDE"]


def lease(
    peer: int,
    start: int,
    end: int,
    seconds: float = 1.0,
    *,
    queue: int = 0,
    version: VersionId = V1,
    leaving: bool = False,
    delays: dict[int, float] | None = None,
) -> Lease:
    near = tuple(sorted((PEERS[other], delay) for other, delay in (delays or {}).items()))
    return Lease(PEERS[peer], MODEL, Span(start, end), "float32", (version,), seconds, queue, leaving, 0.0, near)


def hops(*steps: tuple[int, int, int]) -> Route:
    return Route(tuple(Hop(PEERS[peer], Span(start, end)) for peer, start, end in steps))


spans = st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)).map(lambda ab: (ab[0], max(ab[0] + 1, ab[1])))
near = st.dictionaries(st.integers(0, 3), st.integers(0, 6).map(float), max_size=3)
swarms = st.lists(
    st.tuples(st.integers(0, 3), spans, st.integers(1, 8), st.integers(0, 2), near).map(
        lambda t: lease(t[0], *t[1], seconds=float(t[2]), queue=t[3], delays=t[4])
    ),
    max_size=6,
)
links = st.dictionaries(st.sampled_from(PEERS), st.integers(0, 6).map(float))
DEFAULT = 3.0


def every_route(leases: list[Lease]) -> Iterator[Route]:
    serving = [sorted({item.peer for item in leases if layer in item.span}) for layer in range(LAYERS)]
    for path in product(*serving):
        starts = [layer for layer in range(LAYERS) if layer == 0 or path[layer] != path[layer - 1]]
        yield Route(tuple(Hop(path[a], Span(a, b)) for a, b in zip(starts, [*starts[1:], LAYERS], strict=True)))


def returns(route: Route) -> bool:
    return len({hop.peer for hop in route.hops}) < len(route.hops)


def price_of(route: Route, leases: list[Lease], delays: dict[PeerId, float]) -> float:
    """What a token is expected to take, from the definition."""

    def link(one: PeerId, other: PeerId) -> float:
        measured = [
            s for x in leases for to, s in x.delays if (x.peer, to) in ((one, other), (other, one)) and one != other
        ]
        return max(measured, default=DEFAULT)

    peers = [hop.peer for hop in route.hops]
    total = delays.get(peers[0], DEFAULT) + sum(map(link, peers, peers[1:])) + delays.get(peers[-1], DEFAULT)
    for hop in route.hops:
        for layer in range(hop.span.start, hop.span.end):
            total += min(x.layer_seconds * (1 + x.queue) for x in leases if x.peer == hop.peer and layer in x.span)
    return total


@settings(max_examples=400)
@given(swarms, links, st.randoms())
def test_the_route_is_the_fastest_of_all(
    leases: list[Lease], delays: dict[PeerId, float], chance: random.Random
) -> None:
    everything = list(every_route(leases))
    straight = [route for route in everything if not returns(route)] or everything
    if not everything:
        with pytest.raises(Unreachable):
            find_route(leases, LAYERS, V1, delays=delays, default_delay=DEFAULT)
        return
    found = find_route(leases, LAYERS, V1, delays=delays, default_delay=DEFAULT)
    price = {route: (price_of(route, leases, delays), len(route.hops)) for route in straight}
    assert found in straight
    assert price[found] == min(price.values())
    mixed = chance.sample(leases, len(leases))
    assert find_route(mixed, LAYERS, V1, delays=delays, default_delay=DEFAULT) == found


def test_a_token_pays_for_every_link_on_its_way() -> None:
    leases = [lease(0, 0, 2, 1.0, delays={1: 0.25}), lease(1, 2, 5, 2.0, queue=1)]
    route = find_route(leases, LAYERS, V1, delays={PEERS[0]: 0.5, PEERS[1]: 0.125})
    assert route == hops((0, 0, 2), (1, 2, 5))
    assert price_of(route, leases, {PEERS[0]: 0.5, PEERS[1]: 0.125}) == 0.5 + 2 * 1.0 + 0.25 + 3 * 2.0 * 2 + 0.125


def test_a_hop_is_chosen_for_its_distance_to_the_one_before() -> None:
    leases = [lease(0, 0, 3, delays={1: 0.04, 2: 0.01}), lease(1, 3, 5), lease(2, 3, 5)]
    assert find_route(leases, LAYERS, V1) == hops((0, 0, 3), (2, 3, 5))
    assert find_route(leases, LAYERS, V1, delays={PEERS[2]: 0.5}) == hops((0, 0, 3), (1, 3, 5))


def test_no_peer_is_near_by_its_own_word_alone() -> None:
    leases = [lease(0, 0, 3, delays={1: 0.2, 2: 0.1}), lease(1, 3, 5, delays={0: 0.0}), lease(2, 3, 5)]
    assert find_route(leases, LAYERS, V1, default_delay=1.0) == hops((0, 0, 3), (2, 3, 5))


def test_a_fast_peer_takes_the_layers_that_it_has_from_a_slow_one() -> None:
    leases = [lease(0, 0, 5, 1.0), lease(1, 3, 5, 0.1)]
    assert find_route(leases, LAYERS, V1) == hops((0, 0, 3), (1, 3, 5))
    assert find_route(leases, LAYERS, V1, delays={PEERS[1]: 5.0}) == hops((0, 0, 5))
    apart = [lease(0, 0, 5, 1.0, delays={1: 5.0}), lease(1, 3, 5, 0.1)]
    assert find_route(apart, LAYERS, V1) == hops((0, 0, 5))
    assert find_route([leases[0], lease(1, 3, 5, 0.1, queue=20)], LAYERS, V1) == hops((0, 0, 5))


def test_a_peer_is_met_twice_only_when_there_is_no_other_way() -> None:
    assert find_route([lease(0, 0, 5, 1.0), lease(1, 2, 3, 0.1)], LAYERS, V1, default_delay=0.0) == hops((0, 0, 5))
    needed = [lease(0, 0, 2), lease(1, 2, 3), lease(0, 3, 5)]
    assert find_route(needed, LAYERS, V1) == hops((0, 0, 2), (1, 2, 3), (0, 3, 5))


def test_layers_that_nobody_serves_are_named() -> None:
    leases = [lease(0, 0, 1), lease(1, 2, 3, version=V2), lease(2, 3, 4, leaving=True), lease(3, 4, 5)]
    with pytest.raises(Unreachable, match=rf"Nobody serves layers 1:4 at version {V1[:10]}\."):
        find_route(leases, LAYERS, V1)
    with pytest.raises(Unreachable, match=r"layers 0:1, 2:5 at"):
        find_route([lease(1, 1, 2)], LAYERS, V1)
    with pytest.raises(Unreachable, match=r"Nobody serves layer 2:3 at"):
        find_route([lease(0, 0, 2), lease(0, 3, 5)], LAYERS, V1)


def test_a_banned_peer_is_not_used() -> None:
    leases = [lease(0, 0, 5, 0.1), lease(1, 0, 5, 9.0)]
    assert find_route(leases, LAYERS, V1, banned={PEERS[0]}) == hops((1, 0, 5))
    with pytest.raises(Unreachable):
        find_route(leases, LAYERS, V1, banned=PEERS)


def test_equal_routes_are_chosen_by_fewer_hops_then_by_name() -> None:
    leases = [lease(3, 0, 5), lease(1, 0, 5), lease(2, 2, 5)]
    assert find_route(leases, LAYERS, V1, default_delay=0.0) == hops((1, 0, 5))


def test_coverage_counts_peers() -> None:
    leases = [lease(0, 0, 2), lease(0, 1, 3), lease(1, 1, 2), lease(2, 4, 5, version=V2), lease(3, 3, 4, leaving=True)]
    assert coverage(leases, LAYERS, V1) == (1, 2, 1, 0, 0)
    assert coverage(leases, LAYERS) == (1, 2, 1, 0, 1)


def name(number: int) -> PeerId:
    return PeerId("12D3KooW" + f"{number:044d}".translate(str.maketrans("0123456789", "ABCDEFGHJK")))


def test_a_large_swarm_is_routed_without_trouble() -> None:
    chance = random.Random(1)
    starts = {name(number): chance.randrange(73) for number in range(500)}
    following = {
        peer: [other for other in starts if starts[other] <= starts[peer] + 8 < starts[other] + 8] for peer in starts
    }
    leases = []
    for peer, start in starts.items():
        near = sorted(chance.sample(following[peer], min(16, len(following[peer]))))
        delays = tuple((other, chance.uniform(0.001, 0.1)) for other in near)
        seconds = chance.uniform(0.001, 0.02)
        leases.append(Lease(peer, MODEL, Span(start, start + 8), "float32", (V1,), seconds, 0, False, 0.0, delays))
    began = time.process_time()
    route = find_route(leases, 80, V1)
    took = time.process_time() - began
    assert route.hops[-1].span.end == 80
    assert not returns(route)
    assert took < 1.0


def test_a_large_swarm_in_which_returns_pay_is_routed_without_trouble() -> None:
    chance = random.Random(2)
    leases = []
    for number in range(300):
        start = chance.randrange(120)
        seconds = chance.uniform(0.001, 0.1)
        leases.append(Lease(name(number), MODEL, Span(start, start + 8), "float32", (V1,), seconds, 0, False, 0.0))
    leases += [lease(0, 0, 60, 0.02), lease(1, 60, 128, 0.02)]
    route = find_route(leases, 128, V1, default_delay=0.001)
    assert route.hops[-1].span.end == 128
    assert not returns(route)
