"""Placement: holes first, then the weakest layers; and whoever stands well stays."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import Lease, Span
from p2pmodel.logic.placement import Supply, best_span, choose_span
from p2pmodel.logic.routing import coverage
from p2pmodel.wire import canonical

MODEL = canonical.digest(b"model")
ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def peer(number: int) -> PeerId:
    return PeerId(f"12D3KooW{'A' * 42}{ALPHABET[number // 24]}{ALPHABET[number % 24]}")


def lease(number: int, span: Span, seconds: float = 0.01, leaving: bool = False) -> Lease:
    return Lease(peer(number), MODEL, span, "float32", (VersionId(MODEL),), seconds, 0, leaving, 0.0)


def join_all(layers: int, capacities: list[int], there: list[Lease]) -> list[Lease]:
    leases = list(there)
    for number, capacity in enumerate(capacities, start=len(there)):
        leases.append(lease(number, choose_span(leases, layers, capacity)[0]))
    return leases


@given(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_a_swarm_has_no_hole_once_its_capacity_suffices(layers: int, capacities: list[int]) -> None:
    leases = join_all(layers, capacities, [])
    held = coverage(leases, layers)
    assert sum(n > 0 for n in held) == min(layers, sum(capacities))


@given(st.integers(2, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(1, 9)), max_size=8), st.integers(1, 12))
def test_a_newcomer_covers_as_much_of_the_holes_as_any_span_would(
    layers: int, old: list[tuple[int, int]], capacity: int
) -> None:
    there = [
        lease(i, Span(start, min(layers, start + length))) for i, (start, length) in enumerate(old) if start < layers
    ]
    span, reason = choose_span(there, layers, capacity)
    free = [count == 0 for count in coverage(there, layers)]
    size = min(capacity, layers)
    assert len(span) == size
    assert span.end <= layers
    assert sum(free[span.start : span.end]) == max(
        sum(free[start : start + size]) for start in range(layers - size + 1)
    )
    assert ("nobody" in reason) == any(free[span.start : span.end])


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 20))
def test_equal_peers_spread_evenly(groups: int, capacity: int, joiners: int) -> None:
    held = coverage(join_all(groups * capacity, [capacity] * joiners, []), groups * capacity)
    assert max(held) - min(held) <= 1


@given(st.integers(1, 10), st.integers(1, 5), st.text(min_size=1, max_size=8))
def test_peers_that_join_at_once_take_spans_that_fit_together(groups: int, capacity: int, salt: str) -> None:
    span, _ = choose_span([], groups * capacity, capacity, salt=salt)
    assert span.start % capacity == 0


def test_a_salt_spreads() -> None:
    assert len({choose_span([], 24, 4, salt=peer(i))[0] for i in range(40)}) == 6


def test_the_reason_is_a_sentence() -> None:
    there = [lease(0, Span(0, 2)), lease(1, Span(4, 6))]
    assert choose_span(there, 6, 3) == (Span(1, 4), "layers 2:4 are served by nobody")
    assert choose_span([], 6, 3) == (Span(0, 3), "nobody serves this model yet")
    assert choose_span([*there, lease(2, Span(2, 3))], 6, 1) == (Span(3, 4), "layer 3:4 is served by nobody")
    full = [lease(0, Span(0, 6)), lease(1, Span(0, 3))]
    assert choose_span(full, 6, 3) == (Span(3, 6), "layer 3 is the slowest, with 1 peer")


def test_a_peer_that_leaves_leaves_a_hole() -> None:
    there = [lease(0, Span(0, 6), leaving=True), lease(1, Span(0, 3))]
    assert choose_span(there, 6, 3)[0] == Span(3, 6)


def test_slow_layers_get_help_before_those_with_few_peers() -> None:
    slow = [lease(i, Span(0, 3), seconds=1.0) for i in range(3)]
    assert choose_span([*slow, lease(9, Span(3, 6), seconds=0.01)], 6, 3)[0] == Span(0, 3)


def test_no_room_is_said() -> None:
    with pytest.raises(UsageError, match="no room"):
        choose_span([], 6, 0)


@given(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 3))
def test_the_best_span_is_that_with_the_greatest_sorted_rates(rates: list[float], capacity: int, gain: int) -> None:
    size = min(capacity, len(rates))
    starts = range(len(rates) - size + 1)
    quality = [
        sorted(rate + gain if start <= layer < start + size else rate for layer, rate in enumerate(rates))
        for start in starts
    ]
    assert best_span(rates, size, float(gain), starts, "").start == quality.index(max(quality))


def test_a_peer_that_moves_counts_where_it_goes() -> None:
    moving = replace(lease(0, Span(0, 3)), moving=Span(3, 6))
    supply = Supply([moving, lease(1, Span(0, 2))], 6)
    assert supply.peers == [1, 1, 0, 1, 1, 1]
    assert supply.holes == (Span(2, 3),)
    assert supply.without(peer(0)).holes == (Span(2, 6),)
    assert choose_span([moving], 6, 3)[0] == Span(0, 3)


def test_spare_peers_are_those_that_could_go() -> None:
    assert Supply([lease(0, Span(0, 6)), lease(1, Span(0, 3)), lease(2, Span(1, 3))], 6).spare == 2
    assert Supply([lease(0, Span(0, 6)), replace(lease(1, Span(0, 3)), moving=Span(3, 6))], 6).spare == 0
