"""Waiting for what other threads and processes do."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 90.0
"""Seconds; several times what the slowest of the things waited for takes on two cores with other tests beside it."""


def until(
    holds: Callable[[], T | None],
    seconds: float = PATIENCE,
    meanwhile: Callable[[], object] = lambda: None,
    otherwise: Callable[[], str] = lambda: "it did not come to pass in time",
    pause: float = 0.05,
) -> T:
    """What `holds` returned, the first time that it was true. `meanwhile` is done before each further look, which come
    every `pause` seconds; the failure says what `otherwise` returns."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, otherwise()
        meanwhile()
        time.sleep(pause)
    return found


async def soon(holds: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """The same, for what comes to pass while this event loop runs."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come to pass in time"
        await asyncio.sleep(0.02)
    return found
