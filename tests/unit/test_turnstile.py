"""How many answers are at work, and who waits."""

import asyncio

import pytest

from p2pmodel.gateway.failures import ApiError
from p2pmodel.gateway.turnstile import Turnstile


class Client:
    """Holds `count` places from when it is let in until `leave`."""

    def __init__(self, turnstile: Turnstile, count: int = 1) -> None:
        self.inside = False
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._visit(turnstile, count))

    async def _visit(self, turnstile: Turnstile, count: int) -> None:
        async with turnstile.admitted(count):
            self.inside = True
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_comes_first_is_served_first_also_when_it_needs_more_room() -> None:
    turnstile = Turnstile(2, 10)
    first, wide, late = Client(turnstile), Client(turnstile, 2), Client(turnstile)
    await settle()
    assert [client.inside for client in (first, wide, late)] == [True, False, False]
    assert (turnstile.at_work, turnstile.waiting) == (1, 3)
    await first.leave()
    await settle()
    assert [wide.inside, late.inside] == [True, False]
    await wide.leave()
    await settle()
    assert late.inside
    await late.leave()
    assert (turnstile.at_work, turnstile.waiting, turnstile.answered) == (0, 0, 4)


async def test_who_cannot_wait_is_told_when_to_come_again() -> None:
    turnstile = Turnstile(1, 1)
    inside, waiting = Client(turnstile), Client(turnstile)
    await settle()
    with pytest.raises(ApiError) as error:
        async with turnstile.admitted(1):
            pass
    assert error.value.status == 429
    assert error.value.retry is not None
    assert 1 <= error.value.retry <= 60
    await inside.leave()
    await waiting.leave()


async def test_what_can_never_fit_is_no_matter_of_waiting() -> None:
    with pytest.raises(ApiError) as error:
        async with Turnstile(2, 10).admitted(3):
            pass
    assert error.value.status == 400


async def test_who_gives_up_leaves_no_place_taken() -> None:
    turnstile = Turnstile(1, 10)
    inside, impatient, patient = Client(turnstile), Client(turnstile), Client(turnstile)
    await settle()
    impatient.task.cancel()
    await settle()
    assert turnstile.waiting == 1
    await inside.leave()
    await settle()
    assert patient.inside
    patient.task.cancel()
    await settle()
    assert (turnstile.at_work, turnstile.waiting) == (0, 0)


async def test_who_gives_up_at_the_moment_at_which_another_leaves_breaks_neither() -> None:
    turnstile = Turnstile(1, 10)
    inside, impatient, last = Client(turnstile), Client(turnstile), Client(turnstile)
    await settle()
    inside._leave.set()
    impatient.task.cancel()
    await settle()
    assert inside.task.exception() is None
    assert impatient.task.cancelled()
    assert last.inside
    await last.leave()
    assert (turnstile.at_work, turnstile.waiting, turnstile.answered) == (0, 0, 2)


async def test_who_gives_up_at_the_moment_of_being_let_in_leaves_no_place_taken() -> None:
    turnstile = Turnstile(1, 10)
    inside, unlucky, last = Client(turnstile), Client(turnstile), Client(turnstile)
    await settle()
    inside._leave.set()
    await asyncio.sleep(0)
    unlucky.task.cancel()
    await settle()
    assert last.inside
    await last.leave()
    assert turnstile.at_work == 0
