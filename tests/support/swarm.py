"""Several peers in one process, each with its own P2P daemon."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.swarm import Lease, Presence, Span
from p2pmodel.swarm.host import PeerHost
from p2pmodel.wire.signing import Key

Members = list[tuple[Key, PeerHost]]


@contextlib.asynccontextmanager
async def swarm(folder: Path, size: int, clients: Sequence[int] = ()) -> AsyncIterator[Members]:
    """`size` peers that met through the first; those in `clients` are clients of the DHT."""
    keys = [Key.generate() for _ in range(size)]
    for number, key in enumerate(keys):
        (folder / f"{number}.key").write_bytes(key.to_libp2p())
    hosts = [await PeerHost.start(folder / "0.key")]
    try:
        started = await asyncio.gather(
            *(
                PeerHost.start(folder / f"{n}.key", bootstrap=hosts[0].addresses, client_only=n in clients)
                for n in range(1, size)
            ),
            return_exceptions=True,
        )
        hosts += [host for host in started if isinstance(host, PeerHost)]
        assert len(hosts) == size, started
        yield list(zip(keys, hosts, strict=True))
    finally:
        await asyncio.gather(*(host.stop() for host in hosts))


def lease(key: Key, model: ModelId, *, lasts: float = 20.0, leaving: bool = False, queue: int = 0) -> Lease:
    return Lease(key.peer, model, Span(0, 3), "float32", (model,), 0.001, queue, leaving, time.time() + lasts)


def presence(key: Key, host: PeerHost, model: ModelId) -> Presence:
    gossip = key.derive("gossip").peer
    return Presence(key.peer, model, host.addresses, gossip, (), ("serve",), "p2pmodel test", time.time() + 20.0)
