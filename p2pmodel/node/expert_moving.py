"""Performs what `logic/expert_placement` decides, for a node that chose its experts itself."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.experts import ExpertLease, describe
from p2pmodel.engine.expert_runner import HostedExperts
from p2pmodel.logic.expert_placement import Exchange, ExpertResidence, look, still_good
from p2pmodel.logic.relocation import CONFIRM_SECONDS
from p2pmodel.node.hosting.expert_hosting import ExpertHosting
from p2pmodel.node.hosting.hosting import release_memory
from p2pmodel.node.moving import LOAD_SECONDS, RETRY_SECONDS
from p2pmodel.swarm.directory import Directory

LOOK_SECONDS = 2.0
LINGER_SECONDS = 10.0
"""For which experts are still computed that the lease names no more: trunks read leases every few seconds."""

log = logging.getLogger(__name__)


class ExpertMover:
    def __init__(
        self,
        directory: Directory,
        hosting: ExpertHosting,
        renew: Callable[[], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        """renew: publishes the node's leases."""
        self._directory, self._hosting, self._renew, self._say = directory, hosting, renew, say
        self._not_before = 0.0
        self._residence = ExpertResidence(directory.host.peer, hosting.experts, time.time())

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if time.monotonic() < self._not_before:
                continue
            try:
                exchange = self._look(await self._directory.expert_leases())
                if exchange:
                    await self._make(exchange)
            except P2PModelError as error:
                log.warning("%s", error)

    def _look(self, leases: Sequence[ExpertLease]) -> Exchange | None:
        if not leases:
            return None  # cut off from the swarm, rather than alone in it
        outlook = look(self._residence, leases, self._hosting.layers, self._hosting.count, time.time())
        self._residence = outlook.residence
        return outlook.exchange

    async def _make(self, exchange: Exchange) -> None:
        hosting, what = self._hosting, f"{describe(exchange.going)} for {describe(exchange.coming)}"
        if not hosting.has_room():
            log.warning("no memory to load experts %s beside others; staying", describe(exchange.coming))
            self._not_before = time.monotonic() + RETRY_SECONDS
            return
        self._say(f"exchanging experts {what}: {exchange.reason}")
        hosting.exchange = exchange
        loaded: HostedExperts | None = None
        try:
            await self._renew()
            await asyncio.sleep(CONFIRM_SECONDS)
            if await self._confirmed(exchange):
                loaded = await self._load(exchange)
                loaded = loaded if loaded and await self._confirmed(exchange) else None
        finally:
            if loaded is None:
                hosting.exchange = None
        if loaded is None:
            self._residence = replace(self._residence, empty_since=None, hot_since=None)
            self._say(f"staying with experts {describe(hosting.experts)} after all")
            await self._renew()
        else:
            await self._settle(loaded)

    async def _confirmed(self, exchange: Exchange) -> bool:
        leases = await self._directory.expert_leases()
        return still_good(self._residence, exchange, leases, self._hosting.layers, self._hosting.count)

    async def _load(self, exchange: Exchange) -> HostedExperts | None:
        """None when they cannot be had; the next try is not before RETRY_SECONDS."""
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                return await self._hosting.load(exchange.after(self._hosting.experts))
        except (P2PModelError, OSError, RuntimeError) as error:  # files, memory, and TimeoutError
            log.warning("experts %s could not be loaded: %r", describe(exchange.coming), error)
            self._not_before = time.monotonic() + RETRY_SECONDS
            return None

    async def _settle(self, loaded: HostedExperts) -> None:
        hosting = self._hosting
        before = await hosting.take(loaded)
        self._residence = ExpertResidence(self._residence.peer, hosting.experts, time.time())
        try:
            while True:
                try:
                    await self._renew()
                    break
                except P2PModelError as error:
                    log.warning("%s", error)
                    await asyncio.sleep(LOOK_SECONDS)
            self._say(f"serving experts {describe(hosting.experts)} of layers {hosting.span}")
            await asyncio.sleep(LINGER_SECONDS)
        finally:
            hosting.retire(before)
        del before
        release_memory()
