"""What nodes share: the leases that they read, as late as from a real DHT; and a record of what really was served."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Lease, Span
from p2pmodel.logic.placement import Supply
from p2pmodel.sim.clock import Clock

GLANCE_SECONDS = 3.0
"""Glances nearer to each other than this see the same leases, so that many nodes share what is computed from them."""


class View:
    """The leases that one read has found. They run out while whoever has read them goes on looking at them."""

    def __init__(self, leases: Iterable[Lease], layers: int) -> None:
        self.leases = tuple(sorted(leases, key=lambda lease: lease.expires))
        self._layers = layers
        self._supplies: dict[int, Supply] = {}

    def valid(self, now: float) -> tuple[Lease, ...]:
        return self.leases[self._expired(now) :]

    def supply(self, now: float) -> Supply:
        expired = self._expired(now)
        if expired not in self._supplies:
            self._supplies[expired] = Supply(self.leases[expired:], self._layers)
        return self._supplies[expired]

    def next_expiry(self, now: float) -> float:
        """When the next lease runs out, as far as this view knows."""
        expired = self._expired(now)
        return self.leases[expired].expires if expired < len(self.leases) else float("inf")

    def _expired(self, now: float) -> int:
        return bisect_right(self.leases, now, key=lambda lease: lease.expires)


class Directory:
    """As the DHT: the record that expires last wins, and none is ever withdrawn but by one that says `leaving`."""

    def __init__(self, clock: Clock, layers: int) -> None:
        self._clock, self._layers = clock, layers
        self._leases: dict[PeerId, Lease] = {}
        self._view = View((), layers)
        self._read_at = float("-inf")

    def publish(self, lease: Lease, seconds: float) -> None:
        """It is there for others after `seconds`."""

        def arrive() -> None:
            known = self._leases.get(lease.peer)
            if known is None or known.expires < lease.expires:
                self._leases[lease.peer] = lease

        self._clock.after(seconds, arrive)

    def read(self) -> View:
        now = self._clock.now
        return View((x for x in self._leases.values() if x.expires > now and not x.leaving), self._layers)

    def glance(self) -> View:
        """What somebody has read, up to GLANCE_SECONDS ago."""
        if self._clock.now >= self._read_at + GLANCE_SECONDS:
            self._read_at, self._view = self._clock.now, self.read()
        return self._view


@dataclass
class Moved:
    """One relocation, at `when`; not `done` when the node stayed after all."""

    when: float
    peer: PeerId
    start: Span
    to: Span
    done: bool


@dataclass
class Record:
    """What really was: how many live nodes serve each layer now, the gaps of each layer, and who moved."""

    layers: int
    serving: list[int] = field(init=False)
    gaps: list[tuple[int, float, float]] = field(default_factory=list)
    moves: list[Moved] = field(default_factory=list)
    _dark: dict[int, float] = field(init=False)

    def __post_init__(self) -> None:
        self.serving = [0] * self.layers
        self._dark = dict.fromkeys(range(self.layers), 0.0)

    def count(self, span: Span, change: int, now: float) -> None:
        for layer in range(span.start, span.end):
            before, self.serving[layer] = self.serving[layer], self.serving[layer] + change
            if before == 0:
                self.gaps.append((layer, self._dark.pop(layer), now))
            elif self.serving[layer] == 0:
                self._dark[layer] = now

    def longest_gap(self, since: float, now: float) -> float:
        """The longest time in seconds, of those that ended after `since` or go on, that a layer was not served."""
        ended = [end - max(begin, since) for _, begin, end in self.gaps if end > since]
        return max([*ended, *(now - max(begin, since) for begin in self._dark.values())], default=0.0)
