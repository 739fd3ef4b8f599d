"""The steps of every move: say so in the lease, look again, load, look again, and serve the new beside the old until
those that read the lease before have gone.

What to move to, and who gives way where several want the same, `logic/relocation` and `logic/expert_placement` decide.
"""

import asyncio
import gc
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import torch

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.logic.keeping_up import Heads
from p2pmodel.logic.relocation import CONFIRM_SECONDS
from p2pmodel.node.lineages.heads import first_heads, next_heads
from p2pmodel.node.lineages.lineage import Lineage

RETRY_SECONDS = 300.0
"""After a move that could not be made."""

LOAD_SECONDS = 600.0
"""After which others may count on it no more: what was fetched until then is there the next time."""

log = logging.getLogger(__name__)


class Decided(Protocol):
    """reason: a sentence without its end."""

    @property
    def reason(self) -> str: ...


Move = TypeVar("Move", bound=Decided)
Loaded = TypeVar("Loaded")


class Mover(ABC, Generic[Move, Loaded]):
    """A subclass knows what is moved: layers, or experts. look_seconds: between two looks."""

    look_seconds = 1.0

    def __init__(self, lineage: Lineage, renew: Callable[[], Awaitable[None]], say: Callable[[str], None]) -> None:
        """renew: publishes the node's leases."""
        self._lineage, self._renew, self._say = lineage, renew, say
        self._heads = first_heads(lineage)
        self._not_before = 0.0

    async def run(self) -> None:
        """Until cancelled. A move ends when what was served before has been retired."""
        while True:
            await asyncio.sleep(self.look_seconds)
            if time.monotonic() < self._not_before:
                continue
            try:
                move = await self._look()
                if move:
                    await self._make(move)
            except P2PModelError as error:
                log.warning("%s", error)

    def _see_head(self) -> Heads:
        self._heads = next_heads(self._heads, self._lineage)
        return self._heads

    @abstractmethod
    async def _look(self) -> Move | None:
        """What to do now, if anything."""

    @abstractmethod
    def _served(self) -> str:
        """What is served now, for people: as "layers 0:2"."""

    @abstractmethod
    def _wanted(self, move: Move) -> str:
        """What is to come, in the same words."""

    @abstractmethod
    def _has_room(self, move: Move) -> bool: ...

    @abstractmethod
    def _announce(self, move: Move | None) -> None:
        """The lease says so from its next renewal on; None takes it back."""

    @abstractmethod
    async def _is_still_good(self, move: Move) -> bool:
        """Now that others may have announced the same."""

    @abstractmethod
    async def _load(self, move: Move) -> Loaded: ...

    @abstractmethod
    async def _take(self, loaded: Loaded) -> Loaded:
        """The lease names what was loaded from now on. Returns what was served before, which still is."""

    @abstractmethod
    async def _retire(self, before: Loaded) -> None: ...

    @abstractmethod
    def _begin_again(self) -> None:
        """What spoke for the move has to come up once more before the next one."""

    async def _make(self, move: Move) -> None:
        if not self._has_room(move):
            log.warning("no memory to load %s beside %s; staying", self._wanted(move), self._served())
            self._not_before = time.monotonic() + RETRY_SECONDS
            return
        self._say(f"moving from {self._served()} to {self._wanted(move)}: {move.reason}")
        self._announce(move)
        loaded: Loaded | None = None
        try:
            await self._renew()
            await asyncio.sleep(CONFIRM_SECONDS)
            if await self._is_still_good(move):
                loaded = await self._try_to_load(move)
                loaded = loaded if loaded and await self._is_still_good(move) else None
        finally:
            if loaded is None:
                self._announce(None)
        if loaded is None:
            self._begin_again()
            self._say(f"staying with {self._served()} after all")
            await self._renew()
        else:
            await self._settle(loaded)

    async def _try_to_load(self, move: Move) -> Loaded | None:
        """None when it cannot be had; the next try is not before RETRY_SECONDS."""
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                return await self._load(move)
        except (P2PModelError, OSError, RuntimeError) as error:  # files, memory, and TimeoutError
            log.warning("%s could not be loaded: %r", self._wanted(move), error)
            self._not_before = time.monotonic() + RETRY_SECONDS
            return None

    async def _settle(self, loaded: Loaded) -> None:
        before = await self._take(loaded)
        while True:
            try:
                await self._renew()
                break
            except P2PModelError as error:
                log.warning("%s", error)
                await asyncio.sleep(self.look_seconds)
        self._say(f"serving {self._served()}")
        await self._retire(before)
        del before
        gc.collect()  # a stage's modules and hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
