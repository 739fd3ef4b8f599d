"""What pages are told of a swarm whose DHT keeps them waiting."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from p2pmodel.domain.errors import Unreachable
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.swarm import CLAIM_SECONDS, LEASE_SECONDS, Lease, Presence, Span
from p2pmodel.gateway import feed
from p2pmodel.node.watching import lookout
from p2pmodel.node.watching.lookout import Lookout
from p2pmodel.wire.signing import Key

PEER = Key.generate().peer
MODEL = ModelId("ab" * 32)
PATIENCE = lookout.PATIENCE_SECONDS


def lease(seconds: float) -> Lease:
    return Lease(PEER, MODEL, Span(0, 2), "fp32", (MODEL,), 0.001, 0, False, time.time() + seconds)


class Swarm:
    """Answers a read once it may."""

    def __init__(self, *leases: Lease) -> None:
        self.leases: Sequence[Lease] = leases
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.reads = self.answered = 0
        self.silent = False

    async def read(self) -> tuple[Sequence[Lease], Sequence[Presence]]:
        self.reads += 1
        await self.may_answer.wait()
        self.answered += 1
        if self.silent:
            raise Unreachable("The swarm does not answer.")
        return self.leases, ()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "PATIENCE_SECONDS", 0.01)


async def test_a_read_that_takes_long_keeps_nobody_waiting_and_what_expires_is_gone() -> None:
    swarm = Swarm(lease(0.2), lease(60))
    looking = Lookout(swarm.read)
    assert len((await looking.look())[0]) == 2
    swarm.may_answer.clear()
    async with asyncio.timeout(10):
        while len((await looking.look())[0]) == 2:
            continue
    assert swarm.reads == 2, "one read at a time"
    swarm.leases = (lease(60), lease(60))
    swarm.may_answer.set()
    for _ in range(5):  # it ends while nobody waits for it
        await asyncio.sleep(0)
    assert swarm.answered == 2
    swarm.may_answer.clear()
    assert len((await looking.look())[0]) == 2
    assert swarm.reads == 3


async def test_the_first_read_is_waited_for_and_raises() -> None:
    swarm = Swarm(lease(60))
    looking = Lookout(swarm.read)
    swarm.silent = True
    with pytest.raises(Unreachable):
        await looking.look()
    swarm.silent = False
    swarm.may_answer.clear()
    both = [asyncio.create_task(looking.look()) for _ in range(2)]
    await asyncio.sleep(0)
    swarm.may_answer.set()
    assert [len(leases) for leases, _ in await asyncio.gather(*both)] == [1, 1]
    swarm.silent = True
    assert len((await looking.look())[0]) == 1, "what was known before"


async def test_a_read_that_fails_unexpectedly_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    swarm = Swarm(lease(60))
    looking = Lookout(swarm.read)
    await looking.look()

    async def fail() -> tuple[Sequence[Lease], Sequence[Presence]]:
        raise ZeroDivisionError

    looking._read = fail
    assert len((await looking.look())[0]) == 1
    assert "ZeroDivisionError" in caplog.text


async def test_after_a_while_in_which_nobody_looked_a_read_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm(lease(0.01))
    looking = Lookout(swarm.read)
    await looking.look()
    monkeypatch.setattr(lookout, "LATELY_SECONDS", 0)
    swarm.may_answer.clear()
    look = asyncio.create_task(looking.look())
    await asyncio.wait({look}, timeout=0.05)
    assert not look.done()
    swarm.leases = (lease(60),)
    swarm.may_answer.set()
    assert len((await look)[0]) == 1


def test_who_dies_is_missed_within_the_longest_life_of_a_lease() -> None:
    """A claim made just before, the read that a look waits for, and twice a page's own pause."""
    assert CLAIM_SECONDS + PATIENCE + 2 * feed.EVERY_SECONDS < LEASE_SECONDS
