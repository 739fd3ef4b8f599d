"""When a node moves: to holes quickly but not all at once, to slow layers with patience, and otherwise not."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import Lease, Span
from p2pmodel.logic import relocation
from p2pmodel.logic.placement import Supply
from p2pmodel.logic.relocation import Move, Outlook, Residence, look, still_good
from p2pmodel.wire import canonical

MODEL = canonical.digest(b"model")
LONG_AGO = -1e6
LAYERS = 6
LOW, HIGH = Span(0, 3), Span(3, 6)


def peer(number: int) -> PeerId:
    return PeerId("12D3KooW" + f"{number:044d}".translate(str.maketrans("0123456789", "ABCDEFGHJK")))


def lease(number: int, span: Span, seconds: float = 0.01, moving: Span | None = None) -> Lease:
    return Lease(peer(number), MODEL, span, "float32", (VersionId(MODEL),), seconds, 0, False, 0.0, (), moving)


def residence(own: Lease, capacity: int = 3, since: float = LONG_AGO) -> Residence:
    return Residence(own.peer, own.span, own.layer_seconds, capacity, since)


def look_until(
    at: Residence, leases: list[Lease], layers: int, seconds: float, step: float = 0.5
) -> tuple[Outlook, float]:
    """Looks from time 0 on at leases that stay as they are, until the node moves."""
    supply, now = Supply(leases, layers), 0.0
    while True:
        outlook = look(at, supply, now)
        if outlook.move or now >= seconds:
            return outlook, now
        at, now = outlook.residence, now + step


def test_a_spare_node_fills_a_hole_at_once() -> None:
    own = lease(0, LOW)
    outlook, when = look_until(residence(own), [own, lease(1, LOW)], LAYERS, 60)
    assert outlook.move == Move(HIGH, "layers 3:6 are served by nobody")
    assert when <= 2 * relocation.SLOT_SECONDS


def test_a_node_that_everything_depends_on_stays() -> None:
    own = lease(0, LOW)
    assert look_until(residence(own), [own], LAYERS, 600)[0].move is None
    assert look_until(residence(own), [own, lease(1, HIGH)], LAYERS, 600)[0].move is None


def test_a_hole_that_another_one_is_about_to_fill_is_none() -> None:
    own = lease(0, LOW)
    others = [lease(1, LOW), lease(2, LOW, moving=HIGH)]
    assert look_until(residence(own), [own, *others], LAYERS, 50)[0].move is None


def test_a_node_does_not_count_on_one_that_goes() -> None:
    own = lease(0, LOW)
    assert look_until(residence(own), [own, lease(1, LOW, moving=Span(3, 5))], LAYERS, 600)[0].move is None


def test_who_just_came_waits_for_others_to_fill_a_hole() -> None:
    own = lease(0, LOW)
    _, when = look_until(residence(own, since=0.0), [own, lease(1, LOW)], LAYERS, 60)
    assert when >= relocation.STAY_BEFORE_HOLE_SECONDS


def test_a_smaller_hole_is_left_for_a_larger_one_only_in_the_end() -> None:
    own = lease(0, Span(0, 2))
    leases = [own, lease(1, Span(1, 4))]
    outlook, when = look_until(residence(own, capacity=3), leases, 7, 120)
    assert outlook.move
    assert outlook.move.span == Span(4, 7)
    assert when >= relocation.LAST_RESORT_SECONDS


def test_slow_layers_are_helped_with_patience_and_only_when_it_is_worth_it() -> None:
    own = lease(0, LOW)
    crowded = [own, *(lease(number, LOW) for number in range(1, 5)), lease(9, HIGH)]
    outlook, when = look_until(residence(own), crowded, LAYERS, 3600, step=10)
    assert outlook.move == Move(HIGH, "layer 3 is the slowest, with 1 peer")
    assert when >= relocation.PATIENCE_SECONDS
    _, when = look_until(residence(own, since=0.0), crowded, LAYERS, 3600, step=10)
    assert when >= relocation.STAY_SECONDS
    even = [own, lease(1, LOW), lease(2, HIGH, seconds=0.0102), lease(3, HIGH, seconds=0.0102)]
    assert look_until(residence(own), even, LAYERS, 3600, step=10)[0].move is None


def test_a_need_that_ends_is_forgotten() -> None:
    own = lease(0, LOW)
    crowded = Supply([own, *(lease(number, LOW) for number in range(1, 5)), lease(9, HIGH)], LAYERS)
    even = Supply([own, lease(1, HIGH)], LAYERS)
    at = look(look(residence(own), crowded, 0.0).residence, even, 50.0).residence
    assert at.slow_since is None
    assert look(at, crowded, 100.0).residence.slow_since == 100.0


@given(st.integers(2, 400), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_of_many_that_see_a_hole_few_go_before_the_others_hear_of_it(spare: int, needed: int) -> None:
    leases = [lease(number, Span(0, 3)) for number in range(spare)]
    supply = Supply(leases, 3 + 3 * needed)
    outlooks = [look(residence(own), supply, 0.0) for own in leases]
    first = min(outlook.again for outlook in outlooks)
    assert first <= 5 * relocation.SLOT_SECONDS
    at_once = sum(outlook.again < first + relocation.SLOT_SECONDS / 2 for outlook in outlooks)
    assert at_once <= 8 + 3 * needed


@given(st.integers(0, 5), st.integers(0, 5))
def test_of_two_that_go_at_the_same_moment_one_stays(one: int, other: int) -> None:
    if one == other:
        return
    pair = [lease(one, LOW, moving=HIGH), lease(other, LOW, moving=HIGH)]
    go = [still_good(residence(own), HIGH, pair, LAYERS) for own in pair]
    assert sorted(go) == [False, True]


def test_a_node_stays_after_all_when_the_hole_was_filled_meanwhile() -> None:
    own = lease(0, LOW, moving=HIGH)
    assert still_good(residence(own), HIGH, [own, lease(1, LOW)], LAYERS)
    assert not still_good(residence(own), HIGH, [own, lease(1, LOW), lease(2, HIGH)], LAYERS)
    assert not still_good(residence(own), HIGH, [own], LAYERS)


@settings(deadline=None)
@given(st.integers(3, 20), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=2, max_size=10))
def test_moving_one_by_one_comes_to_rest_and_opens_no_hole(layers: int, joiners: list[tuple[int, int]]) -> None:
    capacities = [min(capacity, layers) for capacity, _ in joiners]
    leases = [lease(i, Span(0, capacities[i]), seconds=0.01 * slow) for i, (_, slow) in enumerate(joiners)]
    holes = sum(map(len, Supply(leases, layers).holes))
    for _ in range(20):
        moves = 0
        for at, own in enumerate(leases):
            outlook, _ = look_until(residence(own, capacities[at]), leases, layers, 1000, step=50)
            if outlook.move:
                moves += 1
                leases[at] = replace(own, span=outlook.move.span)
                left = sum(map(len, Supply(leases, layers).holes))
                assert left <= holes
                holes = left
        if not moves:
            return
    raise AssertionError("peers are still on the move")
