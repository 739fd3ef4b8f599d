"""An event loop for callers that block: what it runs has ended when it is closed."""

import asyncio
import errno
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import uvloop

from p2pmodel.domain.errors import Busy, NotRunning
from p2pmodel.node.machine.loop_thread import LoopThread


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def fail() -> None:
    raise ZeroDivisionError


def test_results_and_errors_come_back_to_any_thread() -> None:
    loop = LoopThread("test")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda number: loop.wait(double(number)), range(20))) == list(range(0, 40, 2))
    with pytest.raises(ZeroDivisionError):
        loop.wait(fail())
    loop.close()


def test_what_still_runs_is_cancelled_and_has_ended_when_it_is_closed() -> None:
    loop, begun, ended = LoopThread("test"), threading.Event(), threading.Event()

    async def go_on() -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            ended.set()

    waiting = loop.submit(go_on())
    assert begun.wait(10)
    loop.close()
    assert ended.is_set()
    with pytest.raises(CancelledError):
        waiting.result(10)


@pytest.mark.parametrize("_", range(20))
def test_nobody_waits_for_ever_for_a_loop_that_is_closed_meanwhile(_: int) -> None:
    loop = LoopThread("test")

    def ask() -> str:
        while True:
            try:
                loop.wait(double(1))
            except NotRunning:
                return "closed"

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        loop.wait(double(1))
        loop.close()
        assert {one.result(10) for one in asking} == {"closed"}
    loop.close()


def test_what_nobody_waits_for_any_more_is_cancelled() -> None:
    loop, begun, ended = LoopThread("test"), threading.Event(), threading.Event()

    async def go_on() -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            ended.set()

    with pytest.raises(NotRunning):
        loop.wait(go_on(), begun.is_set)
    assert ended.wait(10)
    assert loop.wait(double(3), lambda: True) == 6
    loop.close()


def test_a_loop_that_cannot_be_made_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> asyncio.AbstractEventLoop:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(uvloop, "new_event_loop", fail)
    with pytest.raises(Busy, match="Too many open files"):
        LoopThread("test")
