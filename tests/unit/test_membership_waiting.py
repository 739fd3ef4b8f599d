"""Strangers at the door of a private swarm."""

import asyncio

from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm import membership
from p2pmodel.swarm.membership import Membership
from p2pmodel.wire.signing import Key
from p2pmodel.wire.swarm_key import SwarmKey

PROTOCOL = "/p2pmodel/test/1"


class Unwritten:
    def write(self, data: bytes) -> None: ...

    async def drain(self) -> None: ...


async def admitted(door: Membership, caller: PeerId, said: bytes) -> bool:
    reader = asyncio.StreamReader()
    reader.feed_data(said)
    return await door.admit(reader, Unwritten(), PROTOCOL, caller)  # type: ignore[arg-type]


async def test_silent_strangers_do_not_shut_out_known_members() -> None:
    key, host, member, stranger = SwarmKey.generate(), *(Key.generate().peer for _ in range(3))
    door = Membership(key, host)
    hello = b"\0" + key.call_pass(PROTOCOL, member, host)
    assert await admitted(door, member, hello)
    silent = [asyncio.create_task(admitted(door, stranger, b"")) for _ in range(membership.MAX_WAITING)]
    await asyncio.sleep(0)
    assert not await admitted(door, stranger, b"")
    assert await admitted(door, member, hello)
    assert not await admitted(door, stranger, hello)  # another's pass, sent again
    for task in silent:
        task.cancel()
    await asyncio.gather(*silent, return_exceptions=True)
    assert not await admitted(door, stranger, hello)
