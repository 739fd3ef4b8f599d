"""What a host knows of the links to the peers that may come after it on a route; its lease says so to routers."""

from collections.abc import Iterable, Mapping

from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import MAX_DELAYS, Lease, Presence, Span
from p2pmodel.node.asking.delays import SILENT_SECONDS, Delays
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.ping import probe

MOST_A_ROUND = 4
PATIENCE_SECONDS = 2.0


class Neighbours:
    def __init__(self, host: PeerHost) -> None:
        self._peer = host.peer
        self._host = host
        self._delays = Delays(host, self._ping)
        self._offsets: dict[PeerId, float] = {}
        self._next: frozenset[PeerId] = frozenset()

    @property
    def delays(self) -> tuple[tuple[PeerId, float], ...]:
        """The nearest of those that come next, sorted by peer, for a lease."""
        near = sorted(
            (seconds, peer)
            for peer, seconds in self._delays.known().items()
            if peer in self._next and seconds < SILENT_SECONDS
        )
        return tuple(sorted((peer, seconds) for seconds, peer in near[:MAX_DELAYS]))

    @property
    def clock_offset(self) -> float | None:
        """Seconds that the clock of the one that differs most is ahead; None before any was measured."""
        return max((o for p, o in list(self._offsets.items()) if p in self._next), key=abs, default=None)

    async def measure(self, span: Span, leases: Iterable[Lease], presences: Mapping[PeerId, Presence]) -> None:
        """A few of those that host the layer behind `span`: whoever was measured longest ago."""
        following = {lease.peer for lease in leases if span.end in lease.span and lease.peer != self._peer}
        self._next = frozenset(following)
        self._offsets = {peer: offset for peer, offset in self._offsets.items() if peer in following}
        due = sorted((peer for peer in following if peer in presences), key=self._delays.age, reverse=True)
        await self._delays.measure({p: presences[p].addresses for p in due[:MOST_A_ROUND]}, PATIENCE_SECONDS)

    def _ping(self, peer: PeerId, timeout: float) -> float:
        pong = probe(self._host, peer, timeout)
        self._offsets[peer] = pong.clock_offset
        return pong.seconds

    async def close(self) -> None:
        await self._delays.close()
