"""A span of layers on this machine: loaded, measured, served, and leased."""

import asyncio
import logging
import time

from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS, Lease, Span
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.device import DTYPES, Device
from p2pmodel.node.lineage import Lineage
from p2pmodel.node.states import version_state
from p2pmodel.swarm.chain_server import ChainServer, ChainStats
from p2pmodel.swarm.host import PeerHost

log = logging.getLogger(__name__)

KEPT_VERSIONS = 2
"""The head and what came before it, for the sessions that began there."""


class Hosting:
    """Made by `start`; holds the threads that compute."""

    def __init__(
        self, host: PeerHost, lineage: Lineage, span: Span, device: Device, runner: Runner, versions: VersionTable
    ) -> None:
        self.span, self.device = span, device
        self.layer_seconds = runner.measure()
        self._lineage, self._versions, self._runner = lineage, versions, runner
        self._server = ChainServer(host, runner)
        self._server.start()

    @classmethod
    async def start(
        cls, host: PeerHost, lineage: Lineage, checkpoint: Checkpoint, span: Span, device: Device
    ) -> "Hosting":
        """Loads the span's tensors at the head's values; returns when it can serve."""

        def load() -> tuple[Runner, VersionTable]:
            stage = load_stage(checkpoint, span, DTYPES[device.dtype], device.name)
            versions = VersionTable(stage)
            return Runner(stage, lineage.model, versions, max_cached_tokens=device.cached_tokens), versions

        runner, versions = await asyncio.to_thread(load)
        hosting = cls(host, lineage, span, device, runner, versions)
        hosting.adopt(lineage.model)
        hosting.adopt(lineage.served_head)
        return hosting

    def adopt(self, version: VersionId) -> None:
        """Serves the version from the next session on, beside those before it; nothing is reloaded."""
        self._versions.put(version, {} if version == self._lineage.model else version_state(self._lineage, version))
        for old in self._versions.versions[: -KEPT_VERSIONS - 1]:
            if old != self._lineage.model:
                self._versions.drop(old)

    def lease(self, peer: PeerId, *, leaving: bool = False) -> Lease:
        """The newest version first."""
        return Lease(
            peer=peer,
            model=self._lineage.model,
            span=self.span,
            dtype=self.device.dtype,
            versions=tuple(reversed(self._versions.versions)),
            layer_seconds=self.layer_seconds,
            queue=self._server.sessions,
            leaving=leaving,
            expires=time.time() + LEASE_SECONDS,
        )

    @property
    def stats(self) -> ChainStats:
        return self._server.stats()

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)
