"""The libp2p host and its GossipSub, set up for small announcements that every node of a small swarm has to get.

Settings that differ from py-libp2p 0.8.1's, and why:

- heartbeat 1 s and no adaptive gossip: the adaptive one drifts to a heartbeat of 60 s on every node;
- no spam protection: its limit of 10 messages a second counts a node's own; `Gate` has the limits here;
- degree 10, and 10 as the lower bound too: while a mesh is smaller, a peer that subscribes is grafted at once, and
  misses nothing between its replay and its own GRAFT; so up to eleven nodes, meshed or in a star, get every message;
- a cache window of 20 s: a peer that subscribes is sent what the window holds, which is how messages that were
  published before the mesh had formed still arrive;
- Noise and Yamux only: py-libp2p also offers a plaintext transport, which proves nobody's identity;
- sequence numbers start at the nanosecond: they start at the second there, so that a child that was restarted repeats
  numbers, and peers take its messages for seen.
"""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import libp2p.pubsub.pubsub as pubsub_module
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.pubsub import gossipsub
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from p2pmodel.domain.ids import ModelId
from p2pmodel.gossip.gate import REPLAY_SECONDS, Gate, refusal, topic_name
from p2pmodel.gossip.protected import protect_connections

log = logging.getLogger(__name__)

DEGREE, DEGREE_LOW, DEGREE_HIGH = 10, 10, 14
MAX_CONNECTIONS = 256
QUEUED_MESSAGES = 1024
"""Held for our reader of a topic, and for each peer. py-libp2p drops what does not fit, and its 32 are too few: a
replay, or what several peers send at once, is handled between two turns of whoever empties the queue."""

Announcements = AsyncIterator[rpc_pb2.Message]

_PROTOCOLS = [gossipsub.PROTOCOL_ID_V12, gossipsub.PROTOCOL_ID_V11, gossipsub.PROTOCOL_ID]


class GatedPubsub(Pubsub):
    """Pubsub that asks the gate before it verifies anything, and that no peer can end.

    In py-libp2p an RPC that is no protobuf, or a message whose key cannot be parsed, raises through the host.
    """

    gate: Gate

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        if msg_forwarder == self.my_id or self.gate.admit(
            msg_forwarder, msg.from_id, msg.topicIDs, len(msg.data), trio.current_time()
        ):
            await super().push_msg(msg_forwarder, msg)

    async def stream_handler(self, stream: INetStream) -> None:
        try:
            await super().stream_handler(stream)
        except Exception as error:  # supervises: one that left here would end the whole host
            self.gate.refused["rpc"] += 1
            log.debug("%s sent what is no GossipSub: %s", stream.muxed_conn.peer_id, error)
            await stream.reset()


class Mesh:
    """A running host. Made by `open_mesh`."""

    def __init__(self, host: IHost, pubsub: GatedPubsub, gate: Gate) -> None:
        self.host = host
        self.pubsub = pubsub
        self._gate = gate

    @property
    def peer(self) -> str:
        return str(self.host.get_id())

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"{address}/p2p/{self.peer}" for address in self.host.get_transport_addrs())

    @property
    def peers(self) -> int:
        return len(self.pubsub.peers)

    @property
    def refused(self) -> dict[str, int]:
        return dict(self._gate.refused)

    async def subscribe(self, model: ModelId) -> Announcements:
        """The valid messages of other peers. To be called once for a model."""
        topic = topic_name(model)
        self.pubsub.set_topic_validator(topic, partial(self._validate, model), is_async_validator=False)
        subscription = await self.pubsub.subscribe(topic)
        return self._others(aiter(subscription))

    async def publish(self, model: ModelId, data: bytes) -> str:
        """Empty, or the reason why `data` is not published."""
        reason = refusal(model, data)
        if not reason:
            await self.pubsub.publish(topic_name(model), data)
        return reason

    async def _others(self, messages: Announcements) -> Announcements:
        own = self.host.get_id().to_bytes()
        async for message in messages:
            if message.from_id != own:
                yield message

    def _validate(self, model: ModelId, forwarder: ID, message: rpc_pb2.Message) -> bool:
        return forwarder == self.host.get_id() or self._gate.accept(
            message.from_id, model, message.data, trio.current_time()
        )


@asynccontextmanager
async def open_mesh(seed: bytes, listen: str, psk: bytes = b"") -> AsyncIterator[Mesh]:
    """A host with the Ed25519 key of `seed`, listening on the multiaddr `listen`. To be left in the task that entered.
    psk: 32 bytes, of a private network: who lacks them gets no answer, not even a handshake.

    Sets limits of the libp2p modules that have no parameters: a process has one mesh.
    """
    private = Ed25519PrivateKey.from_bytes(seed)
    key = KeyPair(private, private.get_public_key())
    if psk:
        protect_connections()
    host = new_host(
        key_pair=key,
        listen_addrs=[Multiaddr(listen)],
        sec_opt={NOISE: NoiseTransport(key, noise_privkey=create_new_key_pair().private_key)},
        muxer_opt={TProtocol(YAMUX): Yamux},
        psk=psk.hex() or None,
        connection_config=ConnectionConfig(
            max_connections=MAX_CONNECTIONS,
            high_watermark=MAX_CONNECTIONS - 64,
            low_watermark=MAX_CONNECTIONS // 2,
            min_connections=0,
        ),
    )
    router = GossipSub(
        protocols=_PROTOCOLS,
        degree=DEGREE,
        degree_low=DEGREE_LOW,
        degree_high=DEGREE_HIGH,
        heartbeat_interval=1,
        gossip_window=REPLAY_SECONDS,
        gossip_history=REPLAY_SECONDS + 10,
        adaptive_gossip_enabled=False,
        spam_protection_enabled=False,
    )
    # The validators are cheap, and a verdict on a message must not outlast the moment: "too many now" is one of them.
    pubsub = GatedPubsub(host, router, validation_cache_ttl=0, validation_cache_size=1)
    pubsub.gate = gate = Gate()
    pubsub.counter = time.time_ns()
    pubsub_module.SUBSCRIPTION_CHANNEL_SIZE = QUEUED_MESSAGES
    pubsub_module.RpcQueue = partial(RpcQueue, QUEUED_MESSAGES)  # type: ignore[assignment, attr-defined]
    async with host.run([Multiaddr(listen)]), background_trio_service(pubsub), background_trio_service(router):
        await pubsub.wait_until_ready()
        yield Mesh(host, pubsub, gate)
