"""This peer on the network: one P2P daemon, and one member of the DHT, in this process."""

import asyncio
import logging
import os
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TypeVar

from hivemind.dht import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from p2pmodel.domain.errors import NotFound, PeerFailed, Unreachable, UsageError
from p2pmodel.domain.ids import PeerId, check_peer
from p2pmodel.swarm.addresses import check_listen_address, parse_peer_address
from p2pmodel.swarm.daemon import Daemon
from p2pmodel.swarm.dht import create_node
from p2pmodel.swarm.membership import Membership
from p2pmodel.wire.signing import Key
from p2pmodel.wire.swarm_key import SwarmKey

T = TypeVar("T")

CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 10.0
_CONTROL_SECONDS = 5.0

log = logging.getLogger(__name__)


class PeerHost:
    """`peer` is this peer's id; `addresses` the full multiaddrs that others can try."""

    def __init__(self, peer: PeerId, p2p: Daemon, dht: DHTNode, client_only: bool) -> None:
        self.peer = peer
        self.p2p = p2p
        self.dht = dht
        self.client_only = client_only
        self.addresses: tuple[str, ...] = ()

    @classmethod
    async def start(
        cls,
        key_path: Path | None,
        *,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        bootstrap: Sequence[str] = (),
        client_only: bool = False,
        swarm_key: SwarmKey | None = None,
    ) -> "PeerHost":
        """key_path: a libp2p Ed25519 key file; None: a key for this run only. bootstrap: full multiaddrs of peers to
        join, of which one has to answer; client_only: use the DHT without storing for others; swarm_key: of a private
        swarm, whose members alone are spoken with.

        Raises UsageError for addresses that are none, NotFound and StorageError for the key, Busy when a port is in
        use, Unreachable when none of the bootstrap peers answers; the last after 20 s at most.
        """
        ways = [check_listen_address(address) for address in listen]
        for address in bootstrap:
            parse_peer_address(address)
        descriptor, key_file = -1, str(key_path)
        if key_path is None:
            descriptor, key_file = tempfile.mkstemp(prefix="p2pmodel-key-")
            os.write(descriptor, Key.generate().to_libp2p())
            os.close(descriptor)
        try:
            peer = _read_key(key_file).peer
            membership = Membership(swarm_key, peer)
            p2p = await Daemon.launch(key_file, ways, bootstrap, client_only, membership)
        finally:
            if key_path is None:
                os.unlink(key_file)
        try:
            self = cls(peer, p2p, await create_node(p2p, client_only), client_only)
            await self.refresh_addresses()
            await self.join(bootstrap)
        except BaseException:
            await p2p.end()
            raise
        return self

    @property
    def membership(self) -> Membership:
        return self.p2p.membership

    async def join(self, addresses: Sequence[str]) -> None:
        """Meets the swarm through any of these peers; again, when it was lost. Raises UsageError, Unreachable."""
        others = [(peer, way) for peer, way in map(parse_peer_address, addresses) if peer != self.peer]
        if not others:
            return
        ways: dict[PeerId, list[Multiaddr]] = {}
        for peer, way in others:
            ways.setdefault(peer, []).append(way)
        met = await asyncio.gather(*(self._meet(peer, some) for peer, some in ways.items()))
        if not any(met):
            hint = "Check that one of them runs and can be reached, and whether its swarm is private (--swarm-key)."
            raise Unreachable(f"None of the bootstrap peers answers: {', '.join(addresses)}.", hint)
        try:
            async with asyncio.timeout(_JOIN_SECONDS):
                await self.dht.find_nearest_nodes([self.dht.node_id])
        except TimeoutError:
            log.warning("The swarm answers slowly: this peer knows few others yet.")

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Connects to a peer by the addresses that it published, those that are known kinds of addresses of its own;
        with none, a connection that is there will do. Raises PeerFailed when it cannot be reached in 5 s."""
        ways = []
        for address in addresses:
            try:
                owner, way = parse_peer_address(address)
            except UsageError as error:  # whatever a stranger or a newer version has published
                log.debug("%s publishes what cannot be dialled: %s", peer, error.message)
                continue
            if owner == peer:
                ways.append(way)
        await self.p2p.dial(peer, ways, CONNECT_SECONDS)

    async def peers(self) -> list[PeerId]:
        """The peers that there is a connection to, sorted. Raises Unreachable when the daemon is gone."""
        connected = [PeerId(info.peer_id.to_base58()) for info in await self._own(self.p2p.list_peers())]
        return sorted(peer for peer in connected if _is_ours(peer))

    async def refresh_addresses(self) -> tuple[str, ...]:
        """Asks the daemon again: a router's port or a relay may have been found since the start.
        Raises Unreachable when the daemon is gone."""
        _, ways = await self._own(self.p2p._client.identify())
        self.addresses = tuple(f"{way}/p2p/{self.peer}" for way in ways)
        return self.addresses

    async def ended(self) -> int:
        """Waits for the daemon's end, its own or by `stop`: without it this host is deaf; start another."""
        return await self.p2p.ended()

    async def stop(self) -> None:
        """The daemon is gone when this returns."""
        self.dht.is_alive = False
        await self.p2p.end()

    async def _own(self, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(_CONTROL_SECONDS):
                return await answer
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            raise Unreachable("This node's own P2P daemon does not answer.", "Start the node again.") from None

    async def _meet(self, peer: PeerId, ways: Sequence[Multiaddr]) -> bool:
        try:
            await self.p2p.dial(peer, ways, CONNECT_SECONDS)
        except PeerFailed as error:
            log.info("%s", error)
            return False
        return await self.dht.protocol.call_ping(PeerID.from_base58(peer)) is not None


def _read_key(path: str) -> Key:
    try:
        return Key.from_libp2p(Path(path).read_bytes())
    except OSError as error:
        hint = "`p2pmodel id show` makes a home's key, and says which file it is."
        raise NotFound(f"The key file {path} cannot be read: {error.strerror}.", hint) from None


def _is_ours(peer: str) -> bool:
    try:
        check_peer(peer, "peer")
    except ValueError:
        return False
    return True
