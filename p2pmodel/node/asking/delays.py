"""How far other peers are: measured by pings, in threads, and remembered for a while."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm.host import PeerHost

FRESH_SECONDS = 30.0
KEPT_SECONDS = 600.0
PING_SECONDS = 1.0
MOST_AT_ONCE = 8
SILENT_SECONDS = 1.0
"""The delay of a peer that answers no ping: it may be used when nobody else can be."""

log = logging.getLogger(__name__)


class Delays:
    """ping: (peer, timeout) to the seconds of a round trip; blocks, and raises P2PModelError. Belongs to one loop."""

    def __init__(self, host: PeerHost, ping: Callable[[PeerId, float], float]) -> None:
        self._host, self._ping = host, ping
        self._measured: dict[PeerId, tuple[float, float]] = {}
        self._running: dict[PeerId, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)

    def known(self) -> dict[PeerId, float]:
        """Seconds one way; SILENT_SECONDS for a peer that does not answer."""
        oldest = time.monotonic() - KEPT_SECONDS
        self._measured = {peer: found for peer, found in self._measured.items() if found[0] >= oldest}
        return {peer: seconds for peer, (_, seconds) in self._measured.items()}

    def age(self, peer: PeerId) -> float:
        """Seconds since the peer was measured; infinite when it was not."""
        found = self._measured.get(peer)
        return float("inf") if found is None else time.monotonic() - found[0]

    async def measure(self, peers: Mapping[PeerId, Sequence[str]], patience: float) -> None:
        """Measures those (peer -> addresses) that were not of late. Returns when each has a figure, or `patience`
        seconds have passed: the rest goes on meanwhile."""
        for peer, addresses in peers.items():
            if peer not in self._running and peer != self._host.peer and self.age(peer) > FRESH_SECONDS:
                self._running[peer] = asyncio.create_task(self._one(peer, addresses))
        unknown = [task for peer, task in self._running.items() if peer in peers and peer not in self._measured]
        if unknown:
            await asyncio.wait(unknown, timeout=patience)

    async def close(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, peer: PeerId, addresses: Sequence[str]) -> None:
        seconds = SILENT_SECONDS
        try:
            async with self._slots:
                await self._host.connect(peer, addresses)
                seconds = await asyncio.to_thread(self._ping, peer, PING_SECONDS) / 2
        except (P2PModelError, OSError) as error:
            log.debug("no delay of %s: %s", peer, error)
        finally:
            del self._running[peer]
        self._measured[peer] = time.monotonic(), seconds
