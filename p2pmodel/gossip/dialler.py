"""Keeps connections to the peers whose addresses the node named: dials, and after each failure waits longer."""

import logging
import random
from collections import OrderedDict
from collections.abc import Iterable

import trio
from libp2p.abc import IHost
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from multiaddr import Multiaddr

log = logging.getLogger(__name__)

TARGET_CONNECTIONS = 32
"""No peer is dialled above this: GossipSub's mesh needs twelve, and the others of a large swarm are there as spares."""

MAX_KNOWN = 512
MAX_ADDRESSES = 8
DIAL_SECONDS = 15.0
FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS = 0.5, 60.0
CHECK_SECONDS = 1.0
CONCURRENT_DIALS = 8


class _Candidate:
    def __init__(self) -> None:
        self.addresses: list[Multiaddr] = []
        self.due = 0.0
        self.backoff = FIRST_BACKOFF_SECONDS
        self.dialling = False


class Dialler:
    def __init__(self, host: IHost) -> None:
        self._host = host
        self._known: OrderedDict[ID, _Candidate] = OrderedDict()
        self._wake = trio.Event()

    def add(self, addresses: Iterable[str]) -> None:
        """Full multiaddrs. The peers named last are kept, and of each the addresses named last."""
        for text in addresses:
            try:
                info = info_from_p2p_addr(Multiaddr(text))
            except ValueError as error:
                log.debug("not an address of a peer: %.200s (%s)", text, error)
                continue
            if info.peer_id == self._host.get_id():
                continue
            candidate = self._known.setdefault(info.peer_id, _Candidate())
            self._known.move_to_end(info.peer_id)
            fresh = [address for address in info.addrs if address not in candidate.addresses]
            if fresh:
                candidate.addresses = (fresh + candidate.addresses)[:MAX_ADDRESSES]
                candidate.due, candidate.backoff = 0.0, FIRST_BACKOFF_SECONDS
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        self._wake.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                for peer, candidate in self._next():
                    candidate.dialling = True
                    nursery.start_soon(self._dial, peer, candidate)
                with trio.move_on_after(CHECK_SECONDS):
                    await self._wake.wait()
                self._wake = trio.Event()

    def _next(self) -> list[tuple[ID, _Candidate]]:
        connected = set(self._host.get_connected_peers())
        dialling = sum(candidate.dialling for candidate in self._known.values())
        room = min(CONCURRENT_DIALS - dialling, TARGET_CONNECTIONS - len(connected) - dialling)
        now = trio.current_time()
        due = [
            (peer, candidate)
            for peer, candidate in self._known.items()
            if peer not in connected and not candidate.dialling and candidate.due <= now
        ]
        return random.sample(due, max(0, min(room, len(due))))

    async def _dial(self, peer: ID, candidate: _Candidate) -> None:
        try:
            with trio.fail_after(DIAL_SECONDS):
                await self._host.connect(PeerInfo(peer, candidate.addresses))
            candidate.backoff = FIRST_BACKOFF_SECONDS
        except Exception as error:  # supervises: libp2p raises what its sockets, handshakes and nurseries raise
            log.debug("cannot reach %s, again in %.1f s: %s", peer, candidate.backoff, error)
        finally:
            candidate.dialling = False
            candidate.due = trio.current_time() + candidate.backoff * random.uniform(0.75, 1.25)
            candidate.backoff = min(candidate.backoff * 2, LAST_BACKOFF_SECONDS)
            self._wake.set()
