"""Carries the figures that the parts keep into the node's metrics."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import psutil

from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.swarm import Lease
from p2pmodel.logic.routing import coverage
from p2pmodel.node.attendance import Attendance
from p2pmodel.node.community import Community
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.watching.lookout import unexpired
from p2pmodel.node.watching.traffic import Traffic
from p2pmodel.swarm.host import PeerHost
from p2pmodel.telemetry.families import Growth
from p2pmodel.telemetry.metrics import Metrics
from p2pmodel.telemetry.swarm_view import SwarmView

if TYPE_CHECKING:
    from p2pmodel.node.hosting.hosting import Hosting


class Gauges:
    def __init__(
        self,
        metrics: Metrics,
        host: PeerHost,
        lineage: Lineage,
        attendance: Attendance,
        community: Community,
        hosting: "Hosting | None",
        traffic: Traffic,
    ) -> None:
        self._metrics, self._host, self._lineage, self._attendance = metrics, host, lineage, attendance
        self._community, self._hosting, self._traffic = community, hosting, traffic
        self._growth = Growth()
        self._examined: VersionId | None = None
        self._process = psutil.Process()
        if hosting:
            stats = hosting.stats
            metrics.forward_seconds.follow(stats.phases)
            metrics.queue_seconds.follow({"": stats.queued})
            metrics.batch_sessions.follow({"": stats.together})

    async def refresh(self) -> None:
        metrics, attendance = self._metrics, self._attendance
        metrics.peers_connected.set(len(await self._host.peers()))
        leases = unexpired(attendance.leases)
        show_swarm(metrics, self._lineage, leases, self._lineage.served_head, len(self._community.presences))
        metrics.served_round.set(round_of(self._lineage, self._lineage.served_head))
        neighbours = attendance.neighbours
        if neighbours.clock_offset is not None:
            metrics.clock_offset.set(neighbours.clock_offset)
        if delays := [seconds for _, seconds in neighbours.delays]:
            for name, of in (("min", min), ("median", median), ("max", max)):
                metrics.link_delay.labels(name).set(of(delays))
        self._show_exam()
        self._show_traffic()
        self._show_children()
        if self._hosting:
            self._show_hosting(self._hosting)

    def _show_exam(self) -> None:
        """As the first of the maintainers who accepted the head has it."""
        head = self._lineage.head
        if head == self._examined:
            return
        self._examined = head
        self._metrics.set_exam(() if head == self._lineage.model else self._lineage.version(head).scores)

    def _show_traffic(self) -> None:
        metrics, gossip, carry = self._metrics, self._community.gossip, self._growth.carry
        carry(metrics.gossip_restarts, gossip.restarts)
        carry(metrics.announcements.labels("sent"), gossip.sent)
        carry(metrics.announcements.labels("received"), gossip.received)
        metrics.gossip_peers.set(gossip.peers)
        for reason, count in gossip.refused.items():
            carry(metrics.announcements_refused.labels(reason), count)
        for name, total in self._traffic.totals().items():
            what, direction = name.rsplit("_", 1)
            counter = metrics.activation_bytes if what == "activations" else metrics.blob_bytes
            carry(counter.labels(direction), total)
        for direction, total in self._traffic.blobs.items():
            carry(metrics.blobs.labels(direction), total)

    def _show_children(self) -> None:
        gossip = self._community.gossip.pid
        for child in self._process.children():
            try:
                name = "gossip" if child.pid == gossip else "p2pd" if child.name() == "p2pd" else None
                if name:
                    times = child.cpu_times()
                    self._metrics.children_memory.labels(name).set(child.memory_info().rss)
                    self._growth.carry(self._metrics.children_cpu.labels(name), times.user + times.system)
            except psutil.Error:  # it ended just now
                continue

    def _show_hosting(self, hosting: "Hosting") -> None:
        metrics, stats, carry = self._metrics, hosting.stats, self._growth.carry
        stage = hosting.stages.current
        metrics.layers_hosted.set(len(stage.span))
        metrics.span.labels("first").set(stage.span.start)
        metrics.span.labels("behind").set(stage.span.end)
        metrics.layer_seconds.set(stage.layer_seconds)
        metrics.sessions_open.set(stats.sessions)
        carry(metrics.sessions_opened, stats.opened)
        carry(metrics.sessions_failed, stats.failed)
        carry(metrics.tokens, stats.tokens)
        carry(metrics.step_seconds, stats.step_seconds)
        carry(metrics.gradients, stats.gradients)
        metrics.graph_bytes.set(stage.runner.graph_bytes)
        promised, retained = stage.runner.cached_tokens, stage.runner.retained_tokens
        free = max(0, stage.runner.max_cached_tokens - promised)
        for state, tokens in (("promised", promised), ("retained", retained), ("free", free)):
            metrics.cache_tokens.labels(state).set(tokens)
            metrics.cache_bytes.labels(state).set(tokens * stage.position_bytes)
        for (codec, direction, form), total in tuple(hosting.stages.coded.items()):
            counter = metrics.codec_bytes if form == "encoded" else metrics.codec_raw_bytes
            carry(counter.labels(codec, direction), total)
        if hosting.device.name != "cpu":
            held, free = hosting.gpu_memory()
            metrics.gpu_memory.labels("held").set(held)
            metrics.gpu_memory.labels("free").set(free)
            if (busy := hosting.gpu_busy()) is not None:
                metrics.gpu_busy.labels(hosting.device.name.removeprefix("cuda:")).set(busy)


def show_swarm(view: SwarmView, lineage: Lineage, leases: Sequence[Lease], served: VersionId, presences: int) -> None:
    """What leases and records say. served: the version that layers have to be served at to count."""
    head = lineage.head
    view.set_replicas(coverage(leases, lineage.manifest.layers, served))
    view.leases.set(len(leases))
    view.presences.set(presences)
    view.set_head(str(lineage.number(head)), round_of(lineage, head))


def round_of(lineage: Lineage, version: VersionId) -> int:
    """That made the version; 0 for the base."""
    return 0 if version == lineage.model else lineage.version(version).candidate.round
