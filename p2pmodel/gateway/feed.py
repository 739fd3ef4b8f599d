"""What the status page shows: asked for at most every few seconds, however many look, and sent on when it changes."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from p2pmodel.domain.errors import Busy, NotRunning, P2PModelError
from p2pmodel.gateway.ports import StatusSource

log = logging.getLogger(__name__)

EVERY_SECONDS = 2.0
MOST_WATCHERS = 128


class Feed:
    """`begin` says where the status comes from: a server may listen before there is any."""

    def __init__(self) -> None:
        self._source: StatusSource | None = None
        self._latest: dict[str, Any] = {}
        self._read = float("-inf")
        self._reading = asyncio.Lock()
        self._watchers = 0

    def begin(self, source: StatusSource) -> None:
        self._source = source

    async def status(self) -> dict[str, Any]:
        """No older than EVERY_SECONDS. Raises NotRunning while this node starts, and what the source raises."""
        async with self._reading:
            if self._source is None:
                raise NotRunning("This node is starting.", "Try again in a moment.")
            if time.monotonic() - self._read >= EVERY_SECONDS:
                self._latest = await self._source()
                self._read = time.monotonic()
            return self._latest

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Raises Busy when too many watch."""
        if self._watchers >= MOST_WATCHERS:
            raise Busy(f"{MOST_WATCHERS} pages watch this node already.", "Close one, or look at /status.json.")
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def changes(self) -> AsyncIterator[dict[str, Any] | None]:
        """The status, and again whenever it is another one; None where nothing has changed, every few seconds."""
        status: dict[str, Any] | None = None
        shown = status
        while True:
            try:
                latest = await self.status()
            except P2PModelError as error:
                log.debug("%s", error)
            else:
                status = latest
            yield None if status == shown else status
            shown = status
            await asyncio.sleep(EVERY_SECONDS)
