"""Who serves what, and who is there: leases and presences in the DHT, a key per model and kind, a subkey per peer."""

import asyncio
import time

from p2pmodel.domain.errors import Rejected, Unreachable
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.swarm import Lease, Presence
from p2pmodel.swarm import dht
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.validator import Entry, check_validity, dht_key, open_dht_record

_SECONDS = 10.0


class Directory:
    """The entries of one model. Nothing is cached: a read asks the peers nearest to the key."""

    def __init__(self, host: PeerHost, model: ModelId) -> None:
        self.host = host
        self.model = model

    async def publish_lease(self, record: bytes) -> None:
        """The signed record of this peer's Lease. It replaces the peer's earlier one if it expires later, so a lease
        that says `leaving` has to expire later, if by a millisecond, than the one that it withdraws.

        Raises Rejected for a record that nobody would take; Unreachable when nobody took it.
        """
        await self._publish("lease", record)

    async def publish_presence(self, record: bytes) -> None:
        """The signed record of this peer's Presence; as with leases."""
        await self._publish("presence", record)

    async def publish_expert_lease(self, record: bytes) -> None:
        """The signed record of this peer's ExpertLease; as with leases."""
        await self._publish("experts", record)

    async def expert_leases(self) -> list[ExpertLease]:
        """All that are valid now, of peers that are not leaving, sorted by peer. Raises Unreachable."""
        return [noun for noun in await self._read("experts") if isinstance(noun, ExpertLease) and not noun.leaving]

    async def leases(self) -> list[Lease]:
        """All that are valid now, of peers that are not leaving, sorted by peer. Raises Unreachable."""
        return [noun for noun in await self._read("lease") if isinstance(noun, Lease) and not noun.leaving]

    async def presences(self) -> list[Presence]:
        """All that are valid now, sorted by peer. Raises Unreachable."""
        return [noun for noun in await self._read("presence") if isinstance(noun, Presence)]

    async def _publish(self, kind: str, record: bytes) -> None:
        found, noun = open_dht_record(record)
        if (found, noun.peer, noun.model) != (kind, self.host.peer, self.model):
            raise Rejected("owner", f"This is no {kind} of this peer for this model.")
        check_validity(noun, time.time())
        try:
            async with asyncio.timeout(_SECONDS):
                taken = await dht.store(self.host.dht, dht_key(kind, self.model), noun.peer, record, noun.expires)
        except TimeoutError:
            taken = 0
        if not taken:
            raise Unreachable(f"No peer took this peer's {kind}.", "Check the connection, and this machine's clock.")

    async def _read(self, kind: str) -> list[Entry]:
        key = dht_key(kind, self.model)
        try:
            async with asyncio.timeout(_SECONDS):
                found = (await self.host.dht.get_many_by_id([key], float("inf")))[key]
        except TimeoutError:
            raise Unreachable(f"The swarm does not answer who has a {kind}.", "Check the connection.") from None
        now = time.time()
        nouns = [open_dht_record(record)[1] for record, _ in found.value.values()] if found else []
        return sorted((noun for noun in nouns if noun.expires > now), key=lambda noun: noun.peer)
