"""Finding a route where the DHT does not answer."""

import time
from collections.abc import Sequence

import pytest

from p2pmodel.domain.errors import Unreachable
from p2pmodel.domain.ids import ModelId, PeerId
from p2pmodel.domain.swarm import Lease, Presence, Span
from p2pmodel.node.asking.router import Router
from p2pmodel.wire.signing import Key

MODEL = ModelId("ab" * 32)
US, THEM = (PeerId(Key.generate().peer) for _ in range(2))


class Swarm:
    """Stands for host, directory and chain client: one peer, that can be reached, and a DHT that may be silent."""

    peer = US

    def __init__(self) -> None:
        self.silent = False

    async def leases(self) -> list[Lease]:
        if self.silent:
            raise Unreachable("The swarm does not answer who has a lease.")
        return [Lease(THEM, MODEL, Span(0, 2), "fp32", (MODEL,), 0.001, 0, False, time.time() + 20)]

    async def presences(self) -> list[Presence]:
        return []

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        assert peer == THEM

    def ping(self, peer: PeerId, timeout: float) -> float:
        return 0.001


async def test_who_failed_before_is_the_last_resort_also_where_the_dht_is_silent() -> None:
    swarm = Swarm()
    router = Router(swarm, swarm, swarm, 2)  # type: ignore[arg-type]
    try:
        assert [hop.peer for hop in (await router.find(MODEL)).hops] == [THEM]
        router.suspect(THEM)
        swarm.silent = True
        assert [hop.peer for hop in (await router.find(MODEL)).hops] == [THEM]
        with pytest.raises(Unreachable):
            await router.find(MODEL, {THEM})
    finally:
        await router.close()
