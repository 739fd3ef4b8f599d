"""Who serves what, for pages that ask every few seconds.

The DHT may ask a peer that has just died, and wait for it. So a read goes on in the background where it takes long, and
whoever looks meanwhile has the read before, less what has expired since.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar, cast

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.swarm import Lease, Presence

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.5
"""How long a look waits for a read, where there has been one lately."""
LATELY_SECONDS = 15.0
"""What a lease has left at least while its peer renews it: by a read that is older, one that lives could be missed."""

Sighting = tuple[Sequence[Lease], Sequence[Presence]]
Entry = TypeVar("Entry", Lease, Presence, ExpertLease)
Seen = TypeVar("Seen", bound=tuple[Sequence[Lease] | Sequence[Presence] | Sequence[ExpertLease], ...])


class Lookout(Generic[Seen]):
    """Of one event loop. read: asks the swarm; one read is under way at a time."""

    def __init__(self, read: Callable[[], Awaitable[Seen]]) -> None:
        self._read = read
        self._reading: asyncio.Future[Seen] | None = None
        self._known: Seen | None = None
        self._began = self._as_of = float("-inf")

    async def look(self) -> Seen:
        """What is valid now of what is known. Raises what the first read raises; a later one that fails is logged, and
        what was known before goes on expiring."""
        reading, now = self._reading, time.monotonic()
        if reading is None:
            reading = self._reading = asyncio.ensure_future(self._read())
            reading.add_done_callback(self._ended)
            self._began = now
        await asyncio.wait({reading}, timeout=PATIENCE_SECONDS if now - self._as_of < LATELY_SECONDS else None)
        if self._known is None:
            reading.result()  # raises: what has been read is known
        assert self._known is not None
        return cast(Seen, tuple(unexpired(entries) for entries in self._known))

    def _ended(self, reading: asyncio.Future[Seen]) -> None:
        """Keeps what has been read, though nobody may wait for it any more."""
        self._reading = None
        if reading.cancelled():
            return
        error = reading.exception()
        if error is None:
            self._known, self._as_of = reading.result(), self._began
        elif self._known is None:
            return  # whoever waits for the first one is told
        elif isinstance(error, P2PModelError):
            log.warning("%s", error)
        else:
            log.error("a read failed", exc_info=error)


def unexpired(entries: Iterable[Entry]) -> list[Entry]:
    """Those that are valid now."""
    now = time.time()
    return [entry for entry in entries if entry.expires > now]
