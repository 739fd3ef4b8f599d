"""Experts of some layers on this machine: loaded, measured, served, and leased; and others after a swap."""

import asyncio
import threading
import time
from collections.abc import Mapping

from p2pmodel.domain.experts import MAX_LOADS, ExpertLease, load_of
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import CLAIM_SECONDS, Span, as_claimed
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.expert_layout import fetch_part
from p2pmodel.engine.experts import load_experts
from p2pmodel.engine.shard_runner import HostedExperts, ShardRunner
from p2pmodel.engine.versions import VersionTable
from p2pmodel.logic.expert_placement import ExpertSwap
from p2pmodel.logic.experts import Loads
from p2pmodel.node.hosting.keeping import adopt, has_room
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.machine.device import DTYPES, Device
from p2pmodel.node.machine.threads import in_daemon
from p2pmodel.swarm.expert_server import ExpertServer, ExpertStats
from p2pmodel.swarm.host import PeerHost


class ExpertHosting:
    """Made by `start`; holds the thread that computes. swap: what is being made, as the lease says it."""

    def __init__(self, host: PeerHost, lineage: Lineage, checkpoint: Checkpoint, device: Device, span: Span) -> None:
        self.device, self.span = device, span
        self.swap: ExpertSwap | None = None
        self._host, self._lineage, self._checkpoint = host, lineage, checkpoint
        self._hosted: HostedExperts
        self._runner: ShardRunner
        self._loads = Loads(time.monotonic())
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
        self = cls(host, lineage, checkpoint, device, span)
        await in_daemon(fetch_part, checkpoint, span, experts)
        await asyncio.to_thread(self._begin, experts)
        return self

    def adopt(self, version: VersionId) -> None:
        """Serves the version too, from now on."""
        with self._adopting:
            self._adopt(self._hosted, version)

    def lease(self, peer: PeerId, *, leaving: bool = False) -> ExpertLease:
        """The newest version first."""
        experts, swap, rates, layers = self.experts, self.swap, self.loads(), self.layers
        return ExpertLease(
            peer=peer,
            model=self._lineage.model,
            span=Span(min(layers), max(layers) + 1),
            experts=experts,
            dtype=self.device.wide,
            versions=tuple(reversed(self._hosted.versions.versions)),
            pair_seconds=as_claimed(self.pair_seconds),
            queue=max(0, self.stats.busy - 1),
            leaving=leaving,
            expires=time.time() + CLAIM_SECONDS,
            loads=tuple(load_of(rates.get(e, 0.0)) for e in experts) if len(experts) <= MAX_LOADS else (),
            coming=swap.coming if swap else (),
            going=swap.going if swap else (),
        )

    def loads(self) -> Mapping[int, float]:
        """Expert -> pairs of a row and it in a second, a layer, as of lately."""
        self._loads = self._loads.after(self._runner.loads.copy(), len(self.layers), time.monotonic())
        return self._loads.rates

    @property
    def experts(self) -> tuple[int, ...]:
        return self._hosted.shard.experts

    @property
    def layers(self) -> tuple[int, ...]:
        """Those of the span that have experts."""
        return tuple(self._hosted.shard.counts)

    @property
    def count(self) -> int:
        """How many experts the layer with the fewest has."""
        return min(self._hosted.shard.counts.values())

    @property
    def weight_bytes(self) -> int:
        return self._hosted.shard.weight_bytes

    @property
    def stats(self) -> ExpertStats:
        return self._server.stats

    def has_room(self) -> bool:
        """Whether there is memory to load as many experts again."""
        return has_room(self.device, self.weight_bytes)

    async def load(self, experts: tuple[int, ...]) -> HostedExperts:
        """Others, at the versions of the current ones, while these serve."""
        await in_daemon(fetch_part, self._checkpoint, self.span, experts)
        return await in_daemon(self._load, experts, self._hosted.versions.versions)

    async def take(self, hosted: HostedExperts) -> HostedExperts:
        """The lease names these from now on. Those before, which are returned, are still computed with: trunks may have
        read the lease before."""

        def change_over() -> HostedExperts:
            with self._adopting:
                for version in self._hosted.versions.versions:
                    if version not in hosted.versions.versions:  # adopted while they were being loaded
                        self._adopt(hosted, version)
                self.swap = None  # before the others are there: a lease never names as coming what it has
                before, self._hosted = self._hosted, hosted
                self._runner.take(hosted)
                return before

        return await asyncio.to_thread(change_over)

    def retire(self, hosted: HostedExperts) -> None:
        self._runner.drop(hosted)

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)

    def _begin(self, experts: tuple[int, ...]) -> None:
        self._hosted = self._load(experts, (VersionId(self._lineage.model), self._lineage.served_head))
        self._runner = ShardRunner(self._hosted, self._lineage.model)
        self.pair_seconds = self._runner.measure()
        self._server = ExpertServer(self._host, self._runner)
        self._server.start()

    def _load(self, experts: tuple[int, ...], versions: tuple[VersionId, ...]) -> HostedExperts:
        shard = load_experts(self._checkpoint, self.span, experts, DTYPES[self.device.wide], self.device.name)
        hosted = HostedExperts(shard, VersionTable(shard))
        for version in dict.fromkeys(versions):
            self._adopt(hosted, version)
        return hosted

    def _adopt(self, hosted: HostedExperts, version: VersionId) -> None:
        adopt(hosted.versions, self._lineage, version, hosted.shard.own_part)
