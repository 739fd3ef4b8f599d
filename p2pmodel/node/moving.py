"""Performs what `logic/relocation` decides, for a node that chose its layers itself."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Lease, Span
from p2pmodel.logic.placement import Supply
from p2pmodel.logic.relocation import CONFIRM_SECONDS, Move, Residence, look, still_good
from p2pmodel.node.attendance import Attendance
from p2pmodel.node.hosting.hosting import Hosting, release_memory
from p2pmodel.node.hosting.stages import HostedStage

LOOK_SECONDS = 1.0
RETRY_SECONDS = 300.0
"""After a move that could not be made."""

LOAD_SECONDS = 600.0
"""After which others may count on the layers no more: what was fetched until then is there the next time."""

log = logging.getLogger(__name__)


class Mover:
    def __init__(
        self,
        peer: PeerId,
        attendance: Attendance,
        hosting: Hosting,
        layers: int,
        capacity: int,
        say: Callable[[str], None],
    ) -> None:
        self._attendance, self._hosting = attendance, hosting
        self._layers, self._say = layers, say
        self._not_before = 0.0
        self._residence = Residence(peer, hosting.span, hosting.layer_seconds, capacity, time.time())

    async def run(self) -> None:
        """Until cancelled. A move ends when the sessions of the span before have ended."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if time.monotonic() < self._not_before or not self._look(self._attendance.leases):
                continue
            try:
                # What told it to move may be seconds old: others may have gone since.
                move = self._look(await self._attendance.read())
                if move:
                    await self._move(move)
            except P2PModelError as error:
                log.warning("%s", error)

    def _look(self, leases: list[Lease]) -> Move | None:
        now = time.time()
        valid = [lease for lease in leases if lease.expires > now]
        if not valid:
            return None  # cut off from the swarm, rather than alone in it
        outlook = look(self._residence, Supply(valid, self._layers), now)
        self._residence = outlook.residence
        return outlook.move

    async def _move(self, move: Move) -> None:
        if not self._hosting.has_room_for(move.span):
            log.warning("no memory to load layers %s beside %s; staying", move.span, self._hosting.span)
            self._not_before = time.monotonic() + RETRY_SECONDS
            return
        self._say(f"moving from layers {self._hosting.span} to {move.span}: {move.reason}")
        self._hosting.moving = move.span
        stage: HostedStage | None = None
        try:
            await self._attendance.renew()
            await asyncio.sleep(CONFIRM_SECONDS)
            if await self._confirmed(move):
                loaded = await self._load(move.span)
                stage = loaded if loaded and await self._confirmed(move) else None
        finally:
            if stage is None:
                self._hosting.moving = None
        if stage is None:
            self._residence = replace(self._residence, needs=(), slow_since=None)
            self._say(f"staying with layers {self._hosting.span} after all")
            await self._attendance.renew()
        else:
            await self._settle(stage, move.span)

    async def _confirmed(self, move: Move) -> bool:
        return still_good(self._residence, move.span, await self._attendance.read(), self._layers)

    async def _load(self, span: Span) -> HostedStage | None:
        """None when it cannot be had; the next try is not before RETRY_SECONDS."""
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                return await self._hosting.load(span)
        except (P2PModelError, OSError, RuntimeError) as error:  # files, memory, and TimeoutError
            log.warning("layers %s could not be loaded: %r", span, error)
            self._not_before = time.monotonic() + RETRY_SECONDS
            return None

    async def _settle(self, stage: HostedStage, span: Span) -> None:
        before = await self._hosting.take(stage)
        now = time.time()
        self._residence = Residence(
            self._residence.peer, span, self._hosting.layer_seconds, self._residence.capacity, now
        )
        while True:
            try:
                await self._attendance.renew()
                break
            except P2PModelError as error:
                log.warning("%s", error)
                await asyncio.sleep(LOOK_SECONDS)
        self._say(f"serving layers {span} instead of {before.span}")
        await self._hosting.retire(before)
        del before
        release_memory()
