"""Experts of some layers on this machine: loaded, measured, served, and leased."""

import asyncio
import threading
import time

from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS, Span
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.expert_runner import ExpertRunner
from p2pmodel.engine.experts import load_experts
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.machine.device import DTYPES, Device
from p2pmodel.swarm.expert_server import ExpertServer, ExpertStats
from p2pmodel.swarm.host import PeerHost

KEPT_VERSIONS = 2
"""The head and what came before it, for the sessions that began there."""


class ExpertHosting:
    """Made by `start`; holds the thread that computes."""

    def __init__(self, host: PeerHost, lineage: Lineage, device: Device, span: Span, experts: tuple[int, ...]) -> None:
        self.device, self.span, self.experts = device, span, experts
        self._host, self._lineage = host, lineage
        self._adopting = threading.Lock()

    @classmethod
    async def start(
        cls,
        host: PeerHost,
        lineage: Lineage,
        checkpoint: Checkpoint,
        span: Span,
        experts: tuple[int, ...],
        device: Device,
    ) -> "ExpertHosting":
        """Loads the experts at the head's values; returns when it can serve. Raises InvalidInput, Unreachable."""
        self = cls(host, lineage, device, span, experts)
        await asyncio.to_thread(self._load, checkpoint)
        return self

    def adopt(self, version: VersionId) -> None:
        """Serves the version too, from now on."""
        with self._adopting:
            neutral = self._lineage.result(version) is None
            state = {} if neutral else self._shard.own_part(version_state(self._lineage, version))
            self._table.put(version, state)
            for old in self._table.versions[: -KEPT_VERSIONS - 1]:
                if old != self._lineage.model:
                    self._table.drop(old)

    def lease(self, peer: PeerId, *, leaving: bool = False) -> ExpertLease:
        """The newest version first."""
        return ExpertLease(
            peer=peer,
            model=self._lineage.model,
            span=self.span,
            experts=self.experts,
            dtype=self.device.wide,
            versions=tuple(reversed(self._table.versions)),
            pair_seconds=self.pair_seconds,
            queue=max(0, self.stats.busy - 1),
            leaving=leaving,
            expires=time.time() + LEASE_SECONDS,
        )

    @property
    def weight_bytes(self) -> int:
        return self._shard.weight_bytes

    @property
    def stats(self) -> ExpertStats:
        return self._server.stats

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)

    def _load(self, checkpoint: Checkpoint) -> None:
        self._shard = load_experts(checkpoint, self.span, self.experts, DTYPES[self.device.wide], self.device.name)
        self._table = VersionTable(self._shard)
        for version in dict.fromkeys((self._lineage.model, self._lineage.served_head)):
            self.adopt(VersionId(version))
        runner = ExpertRunner(self._shard, self._lineage.model, self._table)
        self.pair_seconds = runner.measure()
        self._server = ExpertServer(self._host, runner)
        self._server.start()
