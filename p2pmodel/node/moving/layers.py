"""Moves a node to the layers that `logic/relocation` names."""

import time
from collections.abc import Callable
from dataclasses import replace

from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Lease
from p2pmodel.logic.placement import Supply
from p2pmodel.logic.relocation import Move, Residence, look, still_good
from p2pmodel.node.attendance import Attendance
from p2pmodel.node.hosting.hosting import Hosting
from p2pmodel.node.hosting.stages import HostedStage
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.moving.mover import Mover


class LayerMover(Mover[Move, HostedStage]):
    def __init__(
        self,
        peer: PeerId,
        lineage: Lineage,
        attendance: Attendance,
        hosting: Hosting,
        capacity: int,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(lineage, attendance.renew, say)
        self._attendance, self._hosting, self._layers = attendance, hosting, lineage.manifest.layers
        self._residence = Residence(peer, hosting.span, hosting.layer_seconds, capacity, time.time())

    async def _look(self) -> Move | None:
        if not self._look_at(self._attendance.leases):
            return None
        # What told it to move may be seconds old: others may have gone since.
        return self._look_at(await self._attendance.read())

    def _look_at(self, leases: list[Lease]) -> Move | None:
        now = time.time()
        valid = [lease for lease in leases if lease.expires > now]
        if not valid:
            return None  # cut off from the swarm, rather than alone in it
        outlook = look(self._residence, Supply(self._hosts(valid), self._layers), now)
        self._residence = outlook.residence
        return outlook.move

    def _served(self) -> str:
        return f"layers {self._hosting.span}"

    def _wanted(self, move: Move) -> str:
        return f"layers {move.span}"

    def _has_room(self, move: Move) -> bool:
        return self._hosting.has_room_for(move.span)

    def _announce(self, move: Move | None) -> None:
        self._hosting.moving = move.span if move else None

    async def _is_still_good(self, move: Move) -> bool:
        return still_good(self._residence, move.span, self._hosts(await self._attendance.read()), self._layers)

    def _hosts(self, leases: list[Lease]) -> list[Lease]:
        return self._see_head().hosts(leases, self._residence.peer)

    async def _load(self, move: Move) -> HostedStage:
        return await self._hosting.load(move.span)

    async def _take(self, loaded: HostedStage) -> HostedStage:
        before = await self._hosting.take(loaded)
        was, hosting = self._residence, self._hosting
        self._residence = Residence(was.peer, hosting.span, hosting.layer_seconds, was.capacity, time.time())
        return before

    async def _retire(self, before: HostedStage) -> None:
        await self._hosting.retire(before)

    def _begin_again(self) -> None:
        self._residence = replace(self._residence, needs=(), slow_since=None)
