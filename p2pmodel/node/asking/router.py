"""Finds a route that can be taken: from the leases in the DHT, the measured delays, and who can be reached."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence

from p2pmodel.domain.errors import P2PModelError, PeerFailed, Unreachable
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS, Hop, Lease, Presence, Route
from p2pmodel.logic.routing import find_route
from p2pmodel.node.asking.delays import Delays
from p2pmodel.swarm.chain_client import ChainClient
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost

MOST_CANDIDATES = 16
PATIENCE_SECONDS = 0.6
"""How long a route waits for the delays of peers that were never measured."""

READ_SECONDS = LEASE_SECONDS / 6
"""How old what is known about others may be."""

log = logging.getLogger(__name__)


class Router:
    """For a peer that asks. Belongs to the loop of its host; `suspect` may be called from any thread."""

    def __init__(self, host: PeerHost, directory: Directory, chain: ChainClient, layers: int) -> None:
        self._host, self._directory, self._layers = host, directory, layers
        self._delays = Delays(host, chain.ping)
        self._suspects: dict[PeerId, float] = {}
        self._leases: Sequence[Lease] = ()
        self._presences: dict[PeerId, Presence] = {}
        self._keeping: asyncio.Task[None] | None = None

    def suspect(self, peer: PeerId) -> None:
        """It failed: for a while it is on no route, unless there is none without it. By then its lease has expired."""
        self._suspects[peer] = time.monotonic() + LEASE_SECONDS

    async def find(self, version: VersionId, banned: Collection[PeerId] = ()) -> Route:
        """The best route by what is known now, connected to its hops. Raises Unreachable, naming the layers that nobody
        serves whom this peer can reach."""
        if self._keeping is None:
            await self._read()
            self._keeping = asyncio.create_task(self._keep_reading())
        now = time.monotonic()
        suspects = {peer for peer, until in self._suspects.items() if until > now}
        # Whoever failed may be one of those that the DHT has to be asked through: what is known comes first.
        for avoided, read in (({*banned, *suspects}, False), ({*banned, *suspects}, True), (set(banned), False)):
            if read:
                try:
                    await self._read()
                except Unreachable as error:  # what was known may still do
                    log.info("%s", error)
                    continue
            with contextlib.suppress(Unreachable):
                return await self._find(version, avoided)
        return await self._find(version, set(banned))

    async def _find(self, version: VersionId, avoided: set[PeerId]) -> Route:
        leases = [lease for lease in self._leases if lease.expires > time.time()]
        candidates = self._candidates(leases, version, avoided)
        await self._delays.measure({peer: self._addresses(peer) for peer in candidates}, PATIENCE_SECONDS)
        while True:
            route = find_route(leases, self._layers, version, delays=self._delays.known(), banned=avoided)
            failed = await asyncio.gather(*(self._connect(hop) for hop in route.hops))
            if not any(failed):
                return route
            avoided |= {hop.peer for hop, lost in zip(route.hops, failed, strict=True) if lost}

    async def _read(self) -> None:
        self._leases, presences = await asyncio.gather(self._directory.leases(), self._directory.presences())
        self._presences = {presence.peer: presence for presence in presences}

    async def _keep_reading(self) -> None:
        while True:
            await asyncio.sleep(READ_SECONDS)
            try:
                await self._read()
            except P2PModelError as error:
                log.warning("%s", error)

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        await self._delays.close()

    def _candidates(self, leases: Sequence[Lease], version: VersionId, banned: Collection[PeerId]) -> list[PeerId]:
        """Those that a route could begin or end with, the fastest first: they are all that has a link to the client."""
        ends = [
            lease
            for lease in leases
            if version in lease.versions
            and lease.peer not in banned
            and (lease.span.start == 0 or lease.span.end >= self._layers)
        ]
        ends.sort(key=lambda lease: (lease.layer_seconds * (1 + lease.queue), lease.peer))
        return [lease.peer for lease in ends[:MOST_CANDIDATES]]

    async def _connect(self, hop: Hop) -> bool:
        """Whether it failed."""
        try:
            await self._host.connect(hop.peer, self._addresses(hop.peer))
        except PeerFailed as error:
            log.info("%s", error)
            return True
        return False

    def _addresses(self, peer: PeerId) -> Sequence[str]:
        return self._presences[peer].addresses if peer in self._presences else ()
