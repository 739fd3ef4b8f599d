"""Keeps a trunk connected to the hosts of its experts, and says when some are missing."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.experts import ExpertLease, ExpertOpening, MissingExpert
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS
from p2pmodel.logic.experts import missing, name_missing
from p2pmodel.node.hosting.dispatching import Dispatcher
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.machine.threads import in_daemon
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.expert_link import ExpertLink
from p2pmodel.swarm.expert_streams import IDLE_SECONDS
from p2pmodel.swarm.host import PeerHost

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
SUSPECT_SECONDS = LEASE_SECONDS / 3
"""How long a peer that failed is left alone."""
REMEMBER_SECONDS = 600.0
"""Peers that failed this lately are connected to after all others."""
MAX_DIALS = 8
"""At once: a peer that says nothing keeps one busy for seconds."""
RENEW_SECONDS = IDLE_SECONDS / 2
"""A link that nothing was sent on for so long is replaced, before its host gives it up."""


class Trunk:
    """Made before the trunk's layers are loaded; `begin` is told of them, and then `run` keeps them served."""

    def __init__(
        self,
        host: PeerHost,
        lineage: Lineage,
        directory: Directory,
        codec: str,
        *,
        spread: bool,
        say: Callable[[str], None],
    ) -> None:
        """Raises InvalidInput for an unknown codec."""
        self._host, self._lineage, self._directory, self._say = host, lineage, directory, say
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._failed_at: dict[PeerId, float] = {}
        self._dialling: set[PeerId] = set()
        self._counts: Mapping[int, int] = {}
        self._leases: Sequence[ExpertLease] = ()
        self._said = ""
        self.dispatcher = Dispatcher(lineage.model, codec, spread=spread, failed=self._suspect)

    def begin(self, counts: Mapping[int, int]) -> None:
        """The layers of the trunk are loaded: layer -> how many experts it needs."""
        self._counts = counts

    def missing(self, version: VersionId) -> list[MissingExpert]:
        """Of the trunk's layers, in order: those that no connected peer serves."""
        return missing(self._leases, self._counts, version, self.dispatcher.helpers)

    def serves(self, version: VersionId) -> bool:
        """Whether the trunk can compute at this version, by its policy."""
        if self.dispatcher.spread:
            return any(version in helper.lease.versions for helper in self.dispatcher.helpers.values())
        return not self.missing(version)

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled. changed: awaited when what the trunk can serve has changed."""
        told = self._standing()
        async with asyncio.TaskGroup() as dials:
            while True:
                try:
                    await self._look(dials)
                    if (standing := self._standing()) != told:
                        await changed()
                        told = standing
                except P2PModelError as error:
                    log.warning("%s", error)
                self._report()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._wake.wait()
                self._wake.clear()

    async def stop(self) -> None:
        await asyncio.to_thread(self.dispatcher.close)

    def _standing(self) -> tuple[bool, ...]:
        return tuple(self.serves(version) for version in self._versions())

    def _versions(self) -> tuple[VersionId, ...]:
        return tuple(dict.fromkeys((VersionId(self._lineage.model), self._lineage.served_head)))

    async def _look(self, dials: asyncio.TaskGroup) -> None:
        for link in self.dispatcher.check():
            if time.monotonic() < link.opened + SUSPECT_SECONDS:  # else it has served well, and may do so again
                self._failed_at[link.peer] = time.monotonic()
        leases, presences = await asyncio.gather(self._directory.expert_leases(), self._directory.presences())
        addresses = {presence.peer: presence.addresses for presence in presences}
        wanted = {lease.peer: lease for lease in leases if self._is_useful(lease)}
        self._leases = list(wanted.values())
        for peer in self.dispatcher.helpers.keys() - wanted.keys():
            self.dispatcher.remove(peer)
        for lease in wanted.values():
            self.dispatcher.renew(lease)
        now = time.monotonic()
        self._failed_at = {peer: at for peer, at in self._failed_at.items() if now < at + REMEMBER_SECONDS}
        fresh = sorted(filter(self._lacks, wanted.keys() & addresses.keys()), key=self._last_failure)
        for peer in fresh[: MAX_DIALS - len(self._dialling)]:
            self._dialling.add(peer)
            dials.create_task(self._connect(wanted[peer], addresses[peer]))

    def _lacks(self, peer: PeerId) -> bool:
        """Whether it should be connected to, now."""
        helper = self.dispatcher.helpers.get(peer)
        is_linked = helper is not None and helper.link.quiet < RENEW_SECONDS
        is_suspect = time.monotonic() < self._last_failure(peer) + SUSPECT_SECONDS
        return not (is_linked or is_suspect or peer in self._dialling)

    def _last_failure(self, peer: PeerId) -> float:
        return self._failed_at.get(peer, -math.inf)

    def _is_useful(self, lease: ExpertLease) -> bool:
        return any(layer in lease.span for layer in self._counts)

    async def _connect(self, lease: ExpertLease, addresses: Sequence[str]) -> None:
        try:
            if lease.peer != self._host.peer:
                await self._host.connect(lease.peer, addresses)
            await in_daemon(self._open, lease)
        except P2PModelError as error:
            log.warning("%s", error)
            self._failed_at[lease.peer] = time.monotonic()
        finally:
            self._dialling.discard(lease.peer)
            self._wake.set()

    def _open(self, lease: ExpertLease) -> None:
        """In a thread of its own, which nobody waits for when the node stops."""
        opening = ExpertOpening(self._lineage.model, self.dispatcher.codec.name)
        self.dispatcher.add(ExpertLink.open(self._host, lease.peer, opening), lease)

    def _suspect(self, peer: PeerId) -> None:
        """From the thread that computes."""
        try:
            self._loop.call_soon_threadsafe(self._left, peer)
        except RuntimeError:  # the node stops, and its loop is closed
            log.debug("%s failed while this node stops", peer)

    def _left(self, peer: PeerId) -> None:
        self._failed_at[peer] = time.monotonic()
        self._wake.set()

    def _report(self) -> None:
        found = self.missing(self._lineage.served_head)
        if found and self._dialling - self._failed_at.keys():
            return  # one of those may be about to serve them
        line = f"nobody serves {name_missing(found)}" if found else "all experts are served"
        if line != self._said:
            self._said = line
            self._say(line)
