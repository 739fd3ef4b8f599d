"""How many answers are at work, and how many wait: beyond that a client is told when to come again."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from p2pmodel.gateway.failures import ApiError

FIRST_GUESS_SECONDS = 5.0
MEMORY = 0.9
MOST_RETRY_SECONDS = 60


class Turnstile:
    """First come, first served: a request waits until all its answers can be at work together."""

    def __init__(self, at_work: int, waiting: int, waited: Callable[[float], None] = lambda _: None) -> None:
        """waited: is told the seconds that each request waited for its turn."""
        self._waited = waited
        self._places, self._most_waiting = at_work, waiting
        self._free = at_work
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._seconds = FIRST_GUESS_SECONDS
        self.answered = 0

    @property
    def at_work(self) -> int:
        return self._places - self._free

    @property
    def waiting(self) -> int:
        return sum(count for count, _ in self._queue)

    @contextlib.asynccontextmanager
    async def admitted(self, count: int) -> AsyncIterator[None]:
        """Raises ApiError: 400 when there can never be room, 429 when too many wait already."""
        came = time.monotonic()
        await self._enter(count)
        began = time.monotonic()
        self._waited(began - came)
        try:
            yield
        finally:
            self._seconds += (1 - MEMORY) * (time.monotonic() - began - self._seconds)
            self._free += count
            self.answered += count
            self._let_in()

    async def _enter(self, count: int) -> None:
        if count > self._places:
            raise ApiError(400, f"This gateway makes at most {self._places} answers at once.", param="n")
        if not self._queue and count <= self._free:
            self._free -= count
            return
        if self.waiting + count > self._most_waiting:
            raise ApiError(
                429,
                f"{self.at_work} answers are at work here and {self.waiting} wait.",
                code="rate_limit_exceeded",
                retry=self._retry_seconds(),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free += count  # it was let in at the moment at which it left
            elif (count, turn) in self._queue:
                self._queue.remove((count, turn))
            self._let_in()
            raise

    def _let_in(self) -> None:
        while self._queue:
            count, turn = self._queue[0]
            if not turn.done():  # it is when its client has just left
                if count > self._free:
                    return
                self._free -= count
                turn.set_result(None)
            self._queue.popleft()

    def _retry_seconds(self) -> int:
        turns = (self.at_work + self.waiting) / self._places
        return min(MOST_RETRY_SECONDS, max(1, math.ceil(turns * self._seconds)))
