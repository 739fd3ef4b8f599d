"""A swarm with churn: nodes join, renew their leases, move, leave, or die without a word, as real ones do.

Where they go and when they move is decided by `logic/`; here are only the delays, the deaths and the bookkeeping.
"""

import random
from dataclasses import dataclass, replace
from functools import partial

from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS, Lease, Span
from p2pmodel.logic.placement import choose_span
from p2pmodel.logic.relocation import CONFIRM_SECONDS, Move, Residence, look, still_good
from p2pmodel.sim.clock import Clock
from p2pmodel.sim.world import Directory, Moved, Record, View

RENEW_SECONDS = LEASE_SECONDS / 3
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_MODEL = ModelId("0" * 64)


@dataclass(frozen=True)
class Conditions:
    """How a swarm's world is; pairs are ranges. movable: the share of nodes whose layers are not fixed by hand;
    lag_seconds: until a lease is read by others; drift: by how much a node's speed, as it measures it, comes and goes.
    """

    layers: int = 80
    capacity: tuple[int, int] = (4, 12)
    layer_seconds: tuple[float, float] = (0.001, 0.01)
    load_seconds: tuple[float, float] = (2.0, 15.0)
    lag_seconds: tuple[float, float] = (0.05, 0.8)
    movable: float = 0.8
    drift: float = 0.05


class Node:
    """One peer. `span` is None until it serves."""

    def __init__(self, swarm: "VirtualSwarm", peer: PeerId) -> None:
        chance, conditions = swarm.chance, swarm.conditions
        self._swarm, self.peer = swarm, peer
        self.capacity = chance.randint(*conditions.capacity)
        self.movable = chance.random() < conditions.movable
        self._layer_seconds = chance.uniform(*conditions.layer_seconds)
        self.alive = True
        self.span: Span | None = None
        self._moving: Span | None = None
        self._residence: Residence | None = None
        self._view = View((), conditions.layers)
        self._next_renewal = 0.0

    def join(self) -> None:
        leases = self._swarm.directory.read().valid(self._swarm.clock.now)
        span, _ = choose_span(leases, self._swarm.conditions.layers, self.capacity, salt=self.peer)
        self._swarm.clock.after(self._swarm.draw(self._swarm.conditions.load_seconds), partial(self._arrive, span))

    def die(self) -> None:
        """Its lease goes on until it expires."""
        if self.alive and self.span is not None:
            self._swarm.record.count(self.span, -1, self._swarm.clock.now)
        self.alive = False

    def leave(self) -> None:
        if self.alive and self.span is not None:
            self._publish(leaving=True)
        self.die()

    def _arrive(self, span: Span) -> None:
        if not self.alive:
            return
        self._settle(span)
        self._renew()

    def _settle(self, span: Span) -> None:
        now = self._swarm.clock.now
        self._swarm.record.count(span, 1, now)
        if self.span is not None:
            self._swarm.record.count(self.span, -1, now)
        self.span, self._moving = span, None
        self._residence = Residence(self.peer, span, self._layer_seconds, self.capacity, now)

    def _renew(self) -> None:
        if not self.alive:
            return
        self._publish()
        self._view = self._swarm.directory.glance()
        seconds = RENEW_SECONDS * self._swarm.chance.uniform(0.98, 1.02)
        self._next_renewal = self._swarm.clock.now + seconds
        self._swarm.clock.after(seconds, self._renew)
        self._look()

    def _publish(self, *, leaving: bool = False) -> None:
        assert self.span is not None
        drift = self._swarm.conditions.drift
        lease = Lease(
            peer=self.peer,
            model=_MODEL,
            span=self.span,
            dtype="float32",
            versions=(VersionId(_MODEL),),
            layer_seconds=self._layer_seconds * self._swarm.chance.uniform(1 - drift, 1 + drift),
            queue=0,
            leaving=leaving,
            expires=self._swarm.clock.now + LEASE_SECONDS,
            moving=self._moving,
        )
        self._swarm.directory.publish(lease, self._swarm.draw(self._swarm.conditions.lag_seconds))

    def _look(self) -> None:
        if not (self.alive and self.movable and self._residence and self._moving is None):
            return
        now = self._swarm.clock.now
        outlook = look(self._residence, self._view.supply(now), now)
        if outlook.move:
            # What told it to move may be seconds old: others may have gone since.
            self._view = self._swarm.directory.read()
            outlook = look(outlook.residence, self._view.supply(now), now)
        self._residence = outlook.residence
        if outlook.move:
            self._move(outlook.move)
            return
        again = min(outlook.again, self._view.next_expiry(now))
        if again < self._next_renewal:
            self._swarm.clock.after(max(again - now, 0.01), self._look)

    def _move(self, move: Move) -> None:
        self._moving = move.span
        self._publish()
        self._swarm.clock.after(CONFIRM_SECONDS, self._load)

    def _load(self) -> None:
        if self._confirmed():
            self._swarm.clock.after(self._swarm.draw(self._swarm.conditions.load_seconds), self._loaded)

    def _loaded(self) -> None:
        if self._confirmed() and self.span and self._moving:
            self._swarm.record.moves.append(Moved(self._swarm.clock.now, self.peer, self.span, self._moving, True))
            self._settle(self._moving)
            self._publish()

    def _confirmed(self) -> bool:
        """Whether the node is there and still should move. If it should not, it says so."""
        now, to = self._swarm.clock.now, self._moving
        if not (self.alive and self._residence and self.span and to):
            return False
        leases = self._swarm.directory.read().valid(now)
        if still_good(self._residence, to, leases, self._swarm.conditions.layers):
            return True
        self._swarm.record.moves.append(Moved(now, self.peer, self.span, to, False))
        self._moving = None
        self._residence = replace(self._residence, needs=(), slow_since=None)
        self._publish()
        return False


class VirtualSwarm:
    """The same seed and the same calls give the same history."""

    def __init__(self, seed: int, conditions: Conditions, clock: Clock | None = None) -> None:
        """clock: of a world that the swarm is a part of."""
        self.chance = random.Random(seed)
        self.conditions = conditions
        self.clock = clock or Clock()
        self.directory = Directory(self.clock, conditions.layers)
        self.record = Record(conditions.layers)
        self.nodes: list[Node] = []

    def draw(self, span: tuple[float, float]) -> float:
        return self.chance.uniform(*span)

    def join(self, nodes: int, over_seconds: float) -> None:
        """Nodes that come one by one, at random moments of the next seconds."""
        for _ in range(nodes):
            node = Node(self, PeerId("12D3KooW" + "".join(self.chance.choices(_BASE58, k=44))))
            self.nodes.append(node)
            self.clock.after(self.chance.uniform(0, over_seconds), node.join)

    def churn(self, seconds: float, mean_life_seconds: float) -> None:
        """For the next seconds, each living node goes at random, after a mean life; half of them without a word. For
        each one that goes another one comes."""
        nodes = [node for node in self.nodes if node.alive]
        end = self.clock.now + seconds

        def go() -> None:
            if self.clock.now >= end:
                return
            node = self.chance.choice([node for node in self.nodes if node.alive])
            node.die() if self.chance.random() < 0.5 else node.leave()
            self.join(1, 1.0)
            self.clock.after(self.chance.expovariate(len(nodes) / mean_life_seconds), go)

        self.clock.after(self.chance.expovariate(len(nodes) / mean_life_seconds), go)

    @property
    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.alive]

    @property
    def moves(self) -> list[Moved]:
        return [move for move in self.record.moves if move.done]
