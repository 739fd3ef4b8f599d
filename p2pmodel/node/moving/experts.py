"""Swaps a node's experts for those that `logic/expert_placement` names."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from p2pmodel.domain.experts import describe
from p2pmodel.engine.shard_runner import HostedExperts
from p2pmodel.logic.expert_placement import ExpertResidence, ExpertSwap, look, still_good
from p2pmodel.node.hosting.expert_hosting import ExpertHosting
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.moving.mover import Mover
from p2pmodel.swarm.directory import Directory

LINGER_SECONDS = 10.0
"""For which experts are still computed that the lease names no more: trunks read leases every few seconds."""


class ExpertMover(Mover[ExpertSwap, HostedExperts]):
    look_seconds = 2.0  # each reads the leases from the swarm

    def __init__(
        self,
        directory: Directory,
        lineage: Lineage,
        hosting: ExpertHosting,
        renew: Callable[[], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(lineage, renew, say)
        self._directory, self._hosting = directory, hosting
        self._residence = ExpertResidence(directory.host.peer, hosting.experts, time.time())

    async def _look(self) -> ExpertSwap | None:
        leases = await self._directory.expert_leases()
        if not leases:
            return None  # cut off from the swarm, rather than alone in it
        heads = self._see_head()
        outlook = look(self._residence, leases, self._hosting.layers, self._hosting.count, time.time(), heads)
        self._residence = outlook.residence
        return outlook.swap

    def _served(self) -> str:
        return f"experts {describe(self._hosting.experts)} of layers {self._hosting.span}"

    def _wanted(self, move: ExpertSwap) -> str:
        return f"experts {describe(move.after(self._hosting.experts))}"

    def _has_room(self, move: ExpertSwap) -> bool:
        return self._hosting.has_room()

    def _announce(self, move: ExpertSwap | None) -> None:
        self._hosting.swap = move

    async def _is_still_good(self, move: ExpertSwap) -> bool:
        leases = await self._directory.expert_leases()
        return still_good(self._residence, move, leases, self._hosting.layers, self._hosting.count, self._see_head())

    async def _load(self, move: ExpertSwap) -> HostedExperts:
        return await self._hosting.load(move.after(self._hosting.experts))

    async def _take(self, loaded: HostedExperts) -> HostedExperts:
        before = await self._hosting.take(loaded)
        self._residence = ExpertResidence(self._residence.peer, self._hosting.experts, time.time())
        return before

    async def _retire(self, before: HostedExperts) -> None:
        try:
            await asyncio.sleep(LINGER_SECONDS)
        finally:
            self._hosting.retire(before)

    def _begin_again(self) -> None:
        self._residence = replace(self._residence, empty_since=None, hot_since=None)
