"""A node among its peers: it hears by gossip, asks them for what gossip lost, and takes part in rounds."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING

from p2pmodel.domain.announcement import Announcement
from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import Digest, PatchId, PeerId, VersionId
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.swarm import Presence
from p2pmodel.gossip.link import GossipLink, GossipStats
from p2pmodel.logic.round_state import RoundState
from p2pmodel.node.lineages.exchange import Exchange
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.rounds.roundkeeper import RoundKeeper
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobFetcher
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost
from p2pmodel.telemetry.metrics import Metrics
from p2pmodel.wire import records
from p2pmodel.wire.signing import Key
from p2pmodel.wire.swarm_key import SwarmKey

if TYPE_CHECKING:
    from p2pmodel.node.rounds.maintaining import Maintainer

log = logging.getLogger(__name__)

ASK_SECONDS = 4.0
"""Between two peers that are asked what they have. Gossip is faster; this finds what it lost."""
CATCH_UP_SECONDS = 60.0
MAX_EXAM_BYTES = 64 << 20
"""Of an exam that every node brings in, so that whoever trains can run it before publishing."""
EXAM_SECONDS = 30.0


class Community:
    def __init__(
        self,
        host: PeerHost,
        home: Home,
        lineage: Lineage,
        directory: Directory,
        metrics: Metrics,
        *,
        listen: str,
        swarm_key: SwarmKey | None = None,
    ) -> None:
        """listen: multiaddr of the gossip child; swarm_key: of a private swarm."""
        self._host, self._home, self._lineage, self._directory, self._metrics = host, home, lineage, directory, metrics
        psk = swarm_key.gossip_psk() if swarm_key else b""
        self._gossip = GossipLink(home.key, self._heard, listen=listen, psk=psk)
        self.exchange = Exchange(host, lineage, self)
        self._keeper: RoundKeeper | None = None
        self.presences: dict[PeerId, Presence] = {}

    async def start(self, contacts: Sequence[PeerId]) -> None:
        """Starts gossip, and catches up with the peers that the node came in by."""
        await asyncio.gather(self._gossip.start([self._lineage.model]), self._catch_up(contacts))

    async def stop(self) -> None:
        await self._gossip.stop()

    def keep_rounds(
        self,
        key: Key,
        maintainer: "Maintainer | None",
        adopted: Callable[[VersionId], Awaitable[None]],
        ask: bool = False,
    ) -> None:
        """From now on what comes in moves the rounds. ask: see RoundKeeper."""
        self._keeper = RoundKeeper(
            self._lineage, key, maintainer, self.announce, adopted, self._find_patches, self._metrics, ask
        )

    async def run(self) -> None:
        assert self._keeper
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.exchange.run())
            tasks.create_task(self._keeper.run())
            tasks.create_task(self._ask_around())
            tasks.create_task(self._bring_exam())

    @property
    def round(self) -> RoundState:
        assert self._keeper
        return self._keeper.state

    @property
    def examined(self) -> int:
        assert self._keeper
        return self._keeper.examined

    @property
    def gossip(self) -> GossipStats:
        return self._gossip.stats()

    @property
    def gossip_identity(self) -> tuple[str, tuple[str, ...]]:
        """Id and multiaddrs of the gossip child."""
        return self._gossip.peer, self._gossip.addresses

    async def announce(self, kind: str, record: BlobRef) -> None:
        """Tells everybody that this node has a record. A failure is logged: peers that ask will find it."""
        noun = Announcement(self._home.key.peer, self._lineage.model, kind, record)
        try:
            await self._gossip.publish(self._lineage.model, self._home.key.sign("announcement", noun))
        except P2PModelError as error:
            log.warning("%s %s could not be announced: %s", kind, record.digest, error)

    async def publish(self, kind: str, digest: Digest) -> BlobRef:
        """A record that another process of this home has put into the store is announced, and moves the round."""
        self._lineage.refresh()
        record = BlobRef(digest, self._home.objects.size(digest) or 0)
        await self.on_record(kind, digest)
        await self.announce(kind, record)
        return record

    async def fetch(self, blob: BlobRef) -> None:
        """From any peer that is there. Raises Busy, Unreachable."""
        fetcher = BlobFetcher(self._host, self._home.objects.sink, patience=CATCH_UP_SECONDS)
        await fetcher.fetch(blob, await self._host.peers())

    async def on_record(self, kind: str, digest: Digest) -> None:
        if kind == "patch":
            self._metrics.patches.labels("admitted").inc()
        if self._keeper:
            await self._keeper.on_record(kind, digest)

    def on_refused(self, kind: str, reason: str) -> None:
        self._metrics.refused.labels(kind, reason).inc()

    def _heard(self, raw: bytes) -> None:
        announcement = records.open_announcement(raw)
        self.exchange.hear(announcement.kind, announcement.record, announcement.holder)

    async def _catch_up(self, contacts: Sequence[PeerId]) -> None:
        for peer in contacts:
            try:
                await self.exchange.ask(peer)
                await self.exchange.settle(CATCH_UP_SECONDS)
            except P2PModelError as error:
                log.warning("%s", error)

    async def _ask_around(self) -> None:
        """Which peer is asked is random, so that news spreads as fast as rumours do."""
        chance = random.Random(self._home.key.peer)
        while True:
            try:
                self.presences = {p.peer: p for p in await self._directory.presences()}
                await self._gossip.connect(
                    [a for p in self.presences.values() if p.peer != self._host.peer for a in p.gossip_addresses]
                )
                others = [p for p in self.presences.values() if p.peer != self._host.peer]
                if others:
                    await self._ask(chance.choice(others))
            except P2PModelError as error:
                log.debug("%s", error)
            await asyncio.sleep(ASK_SECONDS * chance.uniform(0.75, 1.25))

    async def _bring_exam(self) -> None:
        """The exam in force, unless it is large."""
        while True:
            exam = self._lineage.manifest.exam
            if exam.size <= MAX_EXAM_BYTES and not self._home.objects.has(exam.digest):
                try:
                    await self.fetch(exam)
                except P2PModelError as error:
                    log.debug("the exam can't be fetched: %s", error)
            await asyncio.sleep(EXAM_SECONDS)

    async def _find_patches(self, patches: Collection[PatchId], first: Collection[PeerId]) -> None:
        """Asks one peer after the other what they have, `first` before all others, until these patches are here, for
        CATCH_UP_SECONDS."""
        give_up = time.monotonic() + CATCH_UP_SECONDS
        presences = [p for p in self.presences.values() if p.peer != self._host.peer]
        random.shuffle(presences)
        for presence in sorted(presences, key=lambda p: p.peer not in first):
            left = give_up - time.monotonic()
            if left <= 0 or all(patch in self._lineage.patches for patch in patches):
                return
            try:
                await self._ask(presence)
                await self.exchange.settle(left)
            except P2PModelError as error:
                log.debug("%s", error)

    async def _ask(self, presence: Presence) -> None:
        await self._host.connect(presence.peer, presence.addresses)
        found = await self.exchange.ask(presence.peer)
        if found:
            self._metrics.repaired.inc(found)
