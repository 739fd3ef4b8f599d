"""A node's word that it is there: its presence, and the lease on what it serves, renewed until it leaves."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from p2pmodel import __version__
from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.swarm import CLAIM_SECONDS, Lease, Presence
from p2pmodel.node.community import Community
from p2pmodel.node.hosting.neighbours import Neighbours
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost
from p2pmodel.wire.signing import Key

if TYPE_CHECKING:
    from p2pmodel.node.hosting.expert_hosting import ExpertHosting
    from p2pmodel.node.hosting.hosting import Hosting
    from p2pmodel.node.hosting.trunk import Trunk

log = logging.getLogger(__name__)

RENEW_SECONDS = CLAIM_SECONDS / 3
LEAST_PAUSE_SECONDS = 1.0
"""Where a dead peer, whom the DHT still asks, makes a renewal take long."""


class Attendance:
    def __init__(
        self,
        key: Key,
        host: PeerHost,
        lineage: Lineage,
        directory: Directory,
        community: Community,
        hosting: "Hosting | None",
        roles: Sequence[str],
        experts: "ExpertHosting | None" = None,
        trunk: "Trunk | None" = None,
    ) -> None:
        """trunk: that of the hosted layers, where their experts are elsewhere."""
        self._experts, self._trunk = experts, trunk
        self._key, self._host, self._lineage, self._directory = key, host, lineage, directory
        self._community, self._hosting, self._roles = community, hosting, tuple(roles)
        self._neighbours = Neighbours(host)
        self._claimed = False
        self.leases: list[Lease] = []

    async def run(self) -> None:
        """Until cancelled. A DHT that does not answer is tried again: it may be this machine that was cut off."""
        while True:
            began = time.monotonic()
            try:
                await self.renew()
                await self.read()
                if self._hosting:
                    await self._neighbours.measure(self._hosting.span, self.leases, self._community.presences)
            except P2PModelError as error:
                log.warning("%s", error)
            await asyncio.sleep(max(LEAST_PAUSE_SECONDS, began + RENEW_SECONDS - time.monotonic()))

    @property
    def neighbours(self) -> Neighbours:
        return self._neighbours

    async def read(self) -> list[Lease]:
        """All that are valid now. Raises Unreachable."""
        self.leases = await self._directory.leases()
        return self.leases

    async def renew(self) -> None:
        """Raises Unreachable."""
        said = [self._directory.publish_presence(self._key.sign("presence", self._presence()))]
        if self._hosting and (lease := self._lease(self._hosting)) is not None:
            said.append(self._directory.publish_lease(self._key.sign("lease", lease)))
        if self._experts:
            experts = self._experts.lease(self._host.peer)
            said.append(self._directory.publish_expert_lease(self._key.sign("experts", experts)))
        await asyncio.gather(*said)

    async def leave(self) -> None:
        """Withdraws the lease, so that nobody routes here any more."""
        await self._neighbours.close()
        try:
            if self._hosting:
                lease = self._hosting.lease(self._host.peer, leaving=True)
                await self._directory.publish_lease(self._key.sign("lease", lease))
            if self._experts:
                withdrawn = self._experts.lease(self._host.peer, leaving=True)
                await self._directory.publish_expert_lease(self._key.sign("experts", withdrawn))
        except P2PModelError as error:
            log.warning("the lease could not be withdrawn: %s", error)

    def _lease(self, hosting: "Hosting") -> Lease | None:
        """A trunk serves a version when all of its experts are there; what it has never claimed needs no withdrawal."""
        lease = hosting.lease(self._host.peer, delays=self._neighbours.delays)
        if self._trunk is None:
            return lease
        versions = tuple(version for version in lease.versions if self._trunk.serves(version))
        if versions:
            self._claimed = True
            return replace(lease, versions=versions)
        return replace(lease, leaving=True) if self._claimed else None

    def _presence(self) -> Presence:
        gossip_peer, gossip_addresses = self._community.gossip_identity
        return Presence(
            peer=self._host.peer,
            model=self._lineage.model,
            addresses=self._host.addresses,
            gossip_peer=gossip_peer,
            gossip_addresses=gossip_addresses,
            roles=self._roles,
            software=f"p2pmodel/{__version__}",
            expires=time.time() + CLAIM_SECONDS,
        )
