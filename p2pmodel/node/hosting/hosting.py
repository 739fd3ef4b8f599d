"""A span of layers on this machine: loaded, measured, served, and leased; and another one after a move."""

import asyncio
import contextlib
import logging
import threading
import time

import torch

from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import CLAIM_SECONDS, Lease, Span, as_claimed
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.memory import measure_cache
from p2pmodel.engine.remote_experts import RemoteExperts
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.hosting.keeping import adopt, has_room
from p2pmodel.node.hosting.stages import HostedStage, Stages, scaled_bytes
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.machine.device import DTYPES, Device, cached_tokens, free_bytes, gpu_busy, graph_bytes
from p2pmodel.node.machine.threads import in_daemon
from p2pmodel.swarm.chain_server import ChainServer, ChainStats
from p2pmodel.swarm.host import PeerHost
from p2pmodel.tensors import weights

log = logging.getLogger(__name__)


class Hosting:
    """Made by `start`; holds the threads that compute. moving: the span that is being loaded, as the lease says it."""

    def __init__(
        self,
        host: PeerHost,
        lineage: Lineage,
        checkpoint: Checkpoint,
        device: Device,
        first: HostedStage,
        remote: RemoteExperts | None = None,
    ) -> None:
        self.device = device
        self._remote = remote
        self.moving: Span | None = None
        self._lineage, self._checkpoint = lineage, checkpoint
        self._stages = Stages(first)
        self._adopting = threading.Lock()
        self._server = ChainServer(host, self._stages)
        self._server.start()

    @classmethod
    async def start(
        cls,
        host: PeerHost,
        lineage: Lineage,
        checkpoint: Checkpoint,
        span: Span,
        device: Device,
        remote: RemoteExperts | None = None,
    ) -> "Hosting":
        """Loads the span's tensors at the head's values; returns when it can serve. remote: of a trunk, which
        loads no experts."""
        versions = (lineage.model, lineage.served_head)
        first = await asyncio.to_thread(_load, lineage, checkpoint, span, device, versions, remote)
        return cls(host, lineage, checkpoint, device, first, remote)

    @property
    def expert_counts(self) -> dict[int, int]:
        """Layer -> how many experts it has elsewhere."""
        return self._stages.current.expert_counts

    @property
    def span(self) -> Span:
        return self._stages.current.span

    @property
    def layer_seconds(self) -> float:
        return self._stages.current.layer_seconds

    def adopt(self, version: VersionId) -> None:
        """Serves the version from the next session on, beside those before it; nothing is reloaded."""
        with self._adopting:
            adopt(self._stages.current.versions, self._lineage, version)

    def lease(self, peer: PeerId, *, leaving: bool = False, delays: tuple[tuple[PeerId, float], ...] = ()) -> Lease:
        """The newest version first."""
        stage = self._stages.current
        return Lease(
            peer=peer,
            model=self._lineage.model,
            span=stage.span,
            dtype=self.device.dtype,
            versions=tuple(reversed(stage.versions.versions)),
            layer_seconds=as_claimed(stage.layer_seconds),
            queue=self._stages.busy,
            leaving=leaving,
            expires=time.time() + CLAIM_SECONDS,
            delays=delays,
            moving=self.moving,
        )

    @property
    def stats(self) -> ChainStats:
        return self._server.stats()

    def gpu_memory(self) -> tuple[int, int]:
        """Bytes of the GPU that this process holds, and that are free for anybody."""
        return int(torch.cuda.memory_reserved(self.device.name)), free_bytes(self.device)

    def gpu_busy(self) -> float | None:
        """See `device.gpu_busy`."""
        return gpu_busy(self.device)

    @property
    def stages(self) -> Stages:
        return self._stages

    @property
    def cached_tokens(self) -> int:
        """Positions of KV cache that open sessions have been promised."""
        return self._stages.cached_tokens

    def has_room_for(self, span: Span) -> bool:
        """Whether there is memory to load `span` beside what is hosted now."""
        return has_room(self.device, scaled_bytes(self._stages.current, span))

    async def load(self, span: Span) -> HostedStage:
        """Another span, at the versions of the current one, while that one serves."""
        versions = self._stages.current.versions.versions
        return await in_daemon(_load, self._lineage, self._checkpoint, span, self.device, versions, self._remote)

    async def take(self, stage: HostedStage) -> HostedStage:
        """The lease names `stage` from now on. The one before, which is returned, still takes sessions: others may have
        read the lease before."""

        def swap() -> HostedStage:
            with self._adopting:
                for version in self._stages.current.versions.versions:
                    if version not in stage.versions.versions:  # adopted while it was being loaded
                        adopt(stage.versions, self._lineage, version)
                self.moving = None
                return self._stages.take(stage)

        return await asyncio.to_thread(swap)

    async def retire(self, stage: HostedStage) -> None:
        """No new session begins there; returns when the last one that runs has ended."""
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        self._stages.retire(stage, lambda: _tell(loop, ended))
        await ended.wait()

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the node stops, and its loop is closed
        loop.call_soon_threadsafe(event.set)


def _load(
    lineage: Lineage,
    checkpoint: Checkpoint,
    span: Span,
    device: Device,
    versions: tuple[VersionId, ...],
    remote: RemoteExperts | None,
) -> HostedStage:
    if device.scheme and any(slot.name.startswith(weights.PREFIX) for slot in lineage.manifest.slots):
        raise UsageError(
            f"{lineage.manifest.name} takes patches of its weights, which can't be folded into {device.scheme}.",
            "Use --dtype bf16.",
        )
    stage = load_stage(checkpoint, span, DTYPES[device.wide], device.name, device.scheme, trunk=remote is not None)
    table = VersionTable(stage)
    for version in dict.fromkeys(versions):
        adopt(table, lineage, version)
    # Of what is free beside another stage, where there is one: each keeps to its own share.
    runner = Runner(
        stage, lineage.model, table, max_cached_tokens=cached_tokens(device, stage), max_graph_bytes=graph_bytes(device)
    )
    hosted = HostedStage(stage, runner, table, measure_cache(stage).typical)
    stage.board.remote = remote  # from now on: it was tried out and measured without experts
    return hosted
