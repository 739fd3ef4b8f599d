"""Which experts nodes choose, and how they swap them as demand and peers change."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.experts import MAX_LOAD, ExpertLease, load_of, rate_at
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import LEASE_SECONDS, Span
from p2pmodel.logic.expert_placement import ExpertResidence, ExpertSupply, ExpertSwap, choose_experts, look, still_good
from p2pmodel.logic.relocation import CONFIRM_SECONDS, PATIENCE_SECONDS, STAY_SECONDS
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key

MODEL = canonical.digest(b"model")
PEERS = tuple(Key(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)).peer for number in range(40))
LAYERS = (0, 1)
PAIR = 1e-3


def lease(
    peer: PeerId,
    experts: Sequence[int],
    loads: Sequence[float] = (),
    span: Span | None = None,
    pair_seconds: float = PAIR,
) -> ExpertLease:
    return ExpertLease(
        peer,
        MODEL,
        span or Span(0, 2),
        tuple(experts),
        "fp32",
        (MODEL,),
        pair_seconds,
        0,
        False,
        1e9,
        tuple(load_of(load) for load in loads),
    )


def residence(peer: PeerId, experts: Sequence[int], since: float = 0.0) -> ExpertResidence:
    return ExpertResidence(peer, tuple(experts), since)


def test_loads_take_a_byte_and_keep_a_tenth() -> None:
    assert load_of(0.0) == load_of(0.001) == 0
    assert rate_at(0) == 0.0
    assert load_of(1e30) == MAX_LOAD
    for rate in (0.02, 0.5, 1.0, 7.3, 900.0, 2e6):
        assert rate_at(load_of(rate)) == pytest.approx(rate, rel=0.1)


def test_the_first_nodes_share_the_experts() -> None:
    chosen, why = choose_experts([], LAYERS, 8, 4)
    assert chosen == (0, 1, 2, 3)
    assert why == "nobody serves experts of this model yet"
    chosen, why = choose_experts([lease(PEERS[0], chosen)], LAYERS, 8, 4)
    assert chosen == (4, 5, 6, 7)
    assert why == "experts 4-7 are served by nobody"
    assert {choose_experts([], LAYERS, 8, 4, salt=peer)[0] for peer in PEERS} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert choose_experts([], LAYERS, 8, 99)[0] == tuple(range(8))
    with pytest.raises(UsageError, match="no room for a single expert"):
        choose_experts([], LAYERS, 8, 0)


def test_whoever_comes_later_takes_what_is_asked_most() -> None:
    there = [lease(PEERS[0], range(4), (1.0, 50.0, 2.0, 1.0)), lease(PEERS[1], range(4, 8), (1.0, 1.0, 80.0, 3.0))]
    chosen, why = choose_experts(there, LAYERS, 8, 2)
    assert chosen == (1, 6)
    assert why == "expert 6 is asked most for its 1 host"


def test_an_expert_that_is_missing_in_one_layer_is_missing() -> None:
    there = [lease(PEERS[0], range(8)), lease(PEERS[1], range(4), span=Span(0, 1))]
    supply = ExpertSupply(there, LAYERS, 8)
    assert supply.hosts == [1] * 8
    assert ExpertSupply(there[1:], LAYERS, 8).unhosted == list(range(8))
    assert ExpertSupply(there[1:], LAYERS[:1], 8).unhosted == [4, 5, 6, 7]


experts_of_peer = st.frozensets(st.integers(0, 4), min_size=1, max_size=4)
peers_there = st.lists(
    st.tuples(experts_of_peer, st.lists(st.floats(0, 1000), min_size=4, max_size=4), st.floats(1e-4, 1e-2)), max_size=4
)


@settings(max_examples=100, deadline=None)
@given(peers_there, st.integers(1, 4))
def test_no_other_choice_leaves_the_experts_cooler(
    there: list[tuple[frozenset[int], list[float], float]], size: int
) -> None:
    leases = [
        lease(peer, sorted(experts), loads[: len(experts)], pair_seconds=seconds)
        for peer, (experts, loads, seconds) in zip(PEERS, there, strict=False)
    ]
    supply = ExpertSupply(leases, LAYERS, 5)

    def heats(chosen: Sequence[int]) -> list[float]:
        joined = ExpertSupply([*leases, lease(PEERS[-1], chosen)], LAYERS, 5)
        return sorted((supply.demand[e] / joined.rates[e] if joined.rates[e] else inf for e in range(5)), reverse=True)

    chosen = choose_experts(leases, LAYERS, 5, size)[0]
    assert len(chosen) == size
    assert heats(chosen) == min(heats(other) for other in itertools.combinations(range(5), size))


def test_a_hot_expert_is_taken_for_a_cool_one_that_others_keep() -> None:
    there = [lease(PEERS[0], (0, 1), (9.0, 1.0)), lease(PEERS[1], (1, 2), (1.0, 3.0)), lease(PEERS[2], (3,), (3.0,))]
    node = residence(PEERS[1], (1, 2))
    outlook = look(node, there, LAYERS, 4, 1.0)
    assert outlook.swap is None
    assert outlook.residence.hot_since == 1.0
    later = look(outlook.residence, there, LAYERS, 4, STAY_SECONDS + 4 * PATIENCE_SECONDS).swap
    assert later == ExpertSwap((0,), (1,), "expert 0 is asked most for its 1 host")
    assert later.after(node.experts) == (0, 2)
    only_once = look(residence(PEERS[2], (3,)), there, LAYERS, 4, 1e6)
    assert only_once.residence.hot_since is None


def test_a_small_gain_is_not_worth_it() -> None:
    there = [lease(PEERS[0], (0, 1), (1.1, 1.0)), lease(PEERS[1], (0, 1), (1.1, 1.0))]
    assert look(residence(PEERS[0], (0, 1)), there, LAYERS, 2, 1e6).residence.hot_since is None
    there = [lease(PEERS[0], (0,), (1.2,)), lease(PEERS[1], (1,), (1.0,)), lease(PEERS[2], (1,), (1.0,))]
    assert look(residence(PEERS[1], (1,)), there, LAYERS, 2, 1e6).residence.hot_since is None


def test_nothing_is_swapped_where_nobody_waits() -> None:
    for asked, swapped in ((0.1, False), (100.0, True)):
        there = [lease(PEERS[0], (0,), (9 * asked,)), *(lease(peer, (1,), (asked,)) for peer in PEERS[1:3])]
        outlook = look(residence(PEERS[1], (1,)), there, LAYERS, 2, 1.0)
        assert (outlook.residence.hot_since is not None) is swapped


def test_of_two_that_would_leave_an_expert_to_nobody_one_stays() -> None:
    going = [replace(lease(peer, (0,), (1.0,)), coming=(1,), going=(0,)) for peer in PEERS[:2]]
    hot = lease(PEERS[2], (1,), (90.0,))
    swap = ExpertSwap((1,), (0,), "")
    stay = [still_good(residence(one.peer, (0,)), swap, [*going, hot], LAYERS, 2) for one in going]
    assert sorted(stay) == [False, True]


@dataclass
class Node:
    """As `node.moving` does it, in virtual time: say so, look again, load, look again."""

    home: ExpertResidence
    pair_seconds: float
    swap: ExpertSwap | None = None
    due: float = 0.0
    looks: int = 0
    died: float | None = None
    loads: dict[int, float] = field(default_factory=dict)

    def said(self) -> ExpertLease:
        loads = [self.loads.get(expert, 0.0) for expert in self.home.experts]
        said = lease(self.home.peer, self.home.experts, loads, pair_seconds=self.pair_seconds)
        return replace(said, coming=self.swap.coming, going=self.swap.going) if self.swap else said


class World:
    """Nodes see each other's leases as they were a tick ago, and those of the dead until they expire. While nothing
    happens, ticks are long."""

    TICK, CALM, LOAD = 2.0, 15.0, 5.0

    def __init__(self, seed: int, count: int, size: int, nodes: int) -> None:
        self.chance = random.Random(seed)
        self.count, self.size, self.now, self.moves = count, size, 0.0, 0
        self.fresh = iter(PEERS)
        self.nodes: list[Node] = []
        self.leases: list[ExpertLease] = []
        self.demand = [1.0] * count
        for _ in range(nodes):
            self.join()

    def join(self) -> None:
        self.look_around()
        peer = next(self.fresh)
        chosen, _ = choose_experts(self.leases, LAYERS, self.count, self.size, salt=peer)
        self.nodes.append(Node(ExpertResidence(peer, chosen, self.now), PAIR * self.chance.uniform(0.7, 1.4)))

    def look_around(self) -> None:
        self.leases = [n.said() for n in self.nodes if n.died is None or n.died + LEASE_SECONDS > self.now]

    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.died is None]

    def unhosted(self) -> set[int]:
        return set(range(self.count)) - {expert for node in self.alive() for expert in node.home.experts}

    def ask(self) -> None:
        """Trunks share out what is asked by the hosts' speeds."""
        rates = [0.0] * self.count
        for node in self.alive():
            for expert in node.home.experts:
                rates[expert] += 1 / node.pair_seconds
        for node in self.alive():
            node.loads = {e: self.demand[e] / node.pair_seconds / rates[e] for e in node.home.experts}

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            busy = any(node.swap for node in self.nodes) or len(self.leases) != len(self.alive())
            self.now += self.TICK if busy or self.unhosted() else self.CALM
            self.ask()
            before = self.leases
            self.look_around()
            for node in self.alive():
                held = self.unhosted()
                self.turn(node, before)
                assert self.unhosted() <= held, "a swap left an expert to nobody"

    def turn(self, node: Node, leases: Sequence[ExpertLease]) -> None:
        if node.swap is None:
            outlook = look(node.home, leases, LAYERS, self.count, self.now)
            node.home, node.swap = outlook.residence, outlook.swap
            node.due, node.looks = self.now + CONFIRM_SECONDS + self.TICK, 0
        elif self.now >= node.due:
            if not still_good(node.home, node.swap, leases, LAYERS, self.count):
                node.home = replace(node.home, empty_since=None, hot_since=None)
                node.swap = None
            elif node.looks == 0:
                node.looks, node.due = 1, self.now + self.LOAD
            else:
                experts = node.swap.after(node.home.experts)
                node.home = ExpertResidence(node.home.peer, experts, self.now)
                node.swap = None
                self.moves += 1


def hosts_of(world: World) -> list[int]:
    return ExpertSupply([node.said() for node in world.alive()], LAYERS, world.count).hosts


@pytest.mark.parametrize("seed", range(3))
def test_hosts_follow_demand_through_churn_and_come_to_rest(seed: int) -> None:
    world = World(seed, count=8, size=2, nodes=9)
    assert not world.unhosted()
    world.demand = [60.0 if expert in (3, 6) else 4.0 for expert in range(8)]
    world.run(2000)
    hosts = hosts_of(world)
    assert min(hosts) >= 1
    assert min(hosts[3], hosts[6]) > max(h for expert, h in enumerate(hosts) if expert not in (3, 6))
    for _ in range(2):
        world.chance.choice(world.alive()).died = world.now
        world.run(LEASE_SECONDS + 60)
        assert not world.unhosted(), "what the dead have left is hosted again"
        world.join()
    world.demand = [60.0 if expert in (0, 1) else 4.0 for expert in range(8)]
    world.run(3000)
    hosts = hosts_of(world)
    assert min(hosts[0], hosts[1]) > max(hosts[2:])
    moves = world.moves
    world.run(2000)
    assert world.moves == moves, "as long as nothing changes, nobody moves"


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1 << 30), st.lists(st.floats(0.0, 500.0), min_size=4, max_size=4))
def test_no_swap_leaves_an_expert_to_nobody(seed: int, demand: list[float]) -> None:
    world = World(seed, count=4, size=2, nodes=5)
    world.demand = demand
    world.run(1000)
    assert not world.unhosted()


def test_a_swap_leaves_the_hottest_of_both_cooler_and_is_not_taken_back() -> None:
    there = [lease(PEERS[0], (0,), (40.0,)), lease(PEERS[1], (1,), (4.0,)), lease(PEERS[2], (1, 2), (4.0, 2.0))]
    node = ExpertResidence(PEERS[1], (1,), 0.0, hot_since=0.0)
    swap = look(node, there, LAYERS, 3, 1e6).swap
    assert swap is not None
    after = [
        replace(one, experts=swap.after((1,)), loads=(load_of(20.0),)) if one.peer == node.peer else one
        for one in there
    ]
    after[0] = lease(PEERS[0], (0,), (20.0,))
    after[2] = lease(PEERS[2], (1, 2), (8.0, 2.0))
    changed = (*swap.coming, *swap.going)
    heats = [max(ExpertSupply(some, LAYERS, 3).heat(e) for e in changed) for some in (there, after)]
    assert heats[1] < heats[0] / 1.9
    back = replace(node, experts=swap.after((1,)))
    assert look(back, after, LAYERS, 3, 1e6).residence.hot_since is None
