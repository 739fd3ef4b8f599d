"""Objects of a swarm by digest, for commands that are no nodes: they ask, and keep what they get."""

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import Digest, PeerId, short
from p2pmodel.node.lineages.contacts import contacts
from p2pmodel.node.lineages.discovery import BUSY_SECONDS, bootstrap_peers
from p2pmodel.node.machine.loop_thread import LoopThread
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobFetcher
from p2pmodel.swarm.host import PeerHost
from p2pmodel.wire.swarm_key import SwarmKey

log = logging.getLogger(__name__)


class SwarmFinder:
    """A context manager; it meets the swarm when something is first looked for."""

    def __init__(
        self, home: Home, peers: Sequence[str], first: PeerId, limit: int, swarm_key: SwarmKey | None = None
    ) -> None:
        """peers: addresses to begin with, else those that the home knows; first: who is asked first; limit: bytes of
        one object; swarm_key: of a private swarm."""
        self._swarm_key = swarm_key
        self._home, self._peers, self._first, self._limit = home, tuple(peers), first, limit
        self._loop = LoopThread("finding")
        self._host: PeerHost | None = None
        self._unreachable = False

    def __enter__(self) -> "SwarmFinder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._host is not None:
                self._loop.wait(self._host.stop())
        finally:
            self._loop.close()

    def find(self, digest: Digest) -> bytes | None:
        """Verified, and from now on in the home; None when nobody has it."""
        if self._unreachable:
            return None
        try:
            return self._loop.wait(self._fetch(digest))
        except P2PModelError as error:
            log.warning("%s: %s", short(digest), error)
            self._unreachable = self._host is None
            return None

    async def _fetch(self, digest: Digest) -> bytes:
        addresses = self._peers or await asyncio.to_thread(contacts, self._home)
        if self._host is None:
            self._host = await PeerHost.start(None, bootstrap=addresses, client_only=True, swarm_key=self._swarm_key)
        sources = tuple(dict.fromkeys((self._first, *bootstrap_peers(addresses), *await self._host.peers())))
        fetcher = BlobFetcher(self._host, self._home.objects.sink, patience=BUSY_SECONDS)
        await fetcher.fetch(await fetcher.describe(digest, self._limit, sources), sources)
        return await asyncio.to_thread(self._home.objects.load, digest, self._limit)
