"""Swarms in virtual time: layers are not without a host for long, and nobody runs to and fro."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.swarm import LEASE_SECONDS, Span
from p2pmodel.sim.clock import Clock
from p2pmodel.sim.swarm import Conditions, VirtualSwarm

LONGEST_GAP = 2 * LEASE_SECONDS


def settled(seed: int, nodes: int, conditions: Conditions | None = None) -> VirtualSwarm:
    """A swarm some minutes after its nodes have come."""
    swarm = VirtualSwarm(seed, conditions or Conditions())
    swarm.join(nodes, over_seconds=60)
    swarm.clock.run(180)
    assert min(swarm.record.serving) > 0
    return swarm


def kill_hosts_of(swarm: VirtualSwarm, span: Span) -> int:
    """All nodes that serve a part of the span die at once; how many those are."""
    hosts = [node for node in swarm.alive if node.span and node.span.start < span.end and span.start < node.span.end]
    for node in hosts:
        node.die()
    return len(hosts)


def test_five_hundred_nodes_that_come_and_go_serve_every_layer() -> None:
    swarm = settled(1, 500)
    began, moves = swarm.clock.now, len(swarm.moves)
    swarm.churn(300, mean_life_seconds=600)
    swarm.clock.run(300)
    assert swarm.record.longest_gap(began, swarm.clock.now) == 0
    assert len(swarm.moves) - moves <= 5


@pytest.mark.parametrize("seed", range(6))
def test_a_swarm_with_little_to_spare_closes_its_gaps(seed: int) -> None:
    swarm = settled(seed, 45)
    began = swarm.clock.now
    swarm.churn(1800, mean_life_seconds=900)
    swarm.clock.run(1800)
    assert swarm.record.longest_gap(began, swarm.clock.now) <= LONGEST_GAP


@pytest.mark.parametrize(("seed", "nodes"), [(1, 500), (2, 45), (3, 45), (4, 30), (5, 80)])
def test_after_all_hosts_of_some_layers_have_died_others_take_their_place(seed: int, nodes: int) -> None:
    swarm = settled(seed, nodes)
    moves = len(swarm.moves)
    died = kill_hosts_of(swarm, Span(30, 40))
    assert not any(swarm.record.serving[30:40])
    swarm.clock.run(LONGEST_GAP)
    assert min(swarm.record.serving) > 0
    swarm.clock.run(240)
    assert len(swarm.moves) - moves <= 12, f"{died} died"


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(30, 60), st.floats(0.5, 1.0), st.integers(0, 70))
def test_a_gap_anywhere_is_closed(seed: int, nodes: int, movable: float, start: int) -> None:
    swarm = settled(seed, nodes, Conditions(movable=movable))
    kill_hosts_of(swarm, Span(start, start + 4))
    swarm.clock.run(LONGEST_GAP)
    assert min(swarm.record.serving) > 0


@pytest.mark.parametrize(("seed", "nodes"), [(1, 500), (2, 45), (3, 100), (4, 30)])
def test_a_swarm_in_which_nothing_happens_stays_as_it_is(seed: int, nodes: int) -> None:
    swarm = settled(seed, nodes)
    swarm.clock.run(150 if nodes > 100 else 600)
    moves = len(swarm.moves)
    swarm.clock.run(150 if nodes > 100 else 3600)
    assert len(swarm.moves) - moves <= 1


def test_measurements_that_come_and_go_make_nobody_move() -> None:
    swarm = settled(7, 45, Conditions(drift=0.3))
    swarm.clock.run(1800)
    moves = len(swarm.moves)
    swarm.clock.run(3600)
    assert len(swarm.moves) - moves <= 3


def test_the_same_seed_gives_the_same_history() -> None:
    histories = []
    for _ in range(2):
        swarm = settled(5, 40)
        swarm.churn(600, mean_life_seconds=300)
        swarm.clock.run(600)
        histories.append((swarm.record.gaps, swarm.record.moves, swarm.record.serving))
    assert histories[0] == histories[1]


def test_the_clock_runs_in_order() -> None:
    clock, seen = Clock(), []
    clock.after(2.0, lambda: seen.append(("b", clock.now)))
    clock.after(1.0, lambda: clock.after(1.0, lambda: seen.append(("c", clock.now))))
    clock.after(9.0, lambda: seen.append(("d", clock.now)))
    clock.run(5.0)
    assert seen == [("b", 2.0), ("c", 2.0)]
    assert clock.now == 5.0
