"""Carries the figures that the parts keep into the node's metrics."""

from typing import TYPE_CHECKING

from p2pmodel.domain.swarm import Lease
from p2pmodel.logic.routing import coverage
from p2pmodel.node.attendance import Attendance
from p2pmodel.node.community import Community
from p2pmodel.node.lineage import Lineage
from p2pmodel.node.traffic import Traffic
from p2pmodel.swarm.host import PeerHost
from p2pmodel.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from p2pmodel.node.hosting import Hosting


class Gauges:
    """Counters only ever grow, so what they have shown already is remembered."""

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
        self._shown: dict[str, float] = {}

    async def refresh(self) -> None:
        metrics, layers = self._metrics, self._lineage.manifest.layers
        leases: list[Lease] = self._attendance.leases
        metrics.peers_connected.set(len(await self._host.peers()))
        metrics.layers.set(layers)
        metrics.layers_covered.set(sum(1 for n in coverage(leases, layers, self._lineage.served_head) if n))
        metrics.set_head(str(self._lineage.number(self._lineage.head)))
        gossip = self._community.gossip
        metrics.gossip_restarts.inc(self._growth("restarts", gossip.restarts))
        metrics.announcements.labels("sent").inc(self._growth("announced", gossip.sent))
        metrics.announcements.labels("received").inc(self._growth("heard", gossip.received))
        for name, total in self._traffic.totals().items():
            what, direction = name.rsplit("_", 1)
            counter = metrics.activation_bytes if what == "activations" else metrics.blob_bytes
            counter.labels(direction).inc(self._growth(name, total))
        if self._hosting:
            stats = self._hosting.stats
            metrics.layers_hosted.set(len(self._hosting.span))
            metrics.sessions_open.set(stats.sessions)
            metrics.tokens.inc(self._growth("tokens", stats.tokens))
            metrics.step_seconds.inc(self._growth("steps", stats.step_seconds))

    def _growth(self, name: str, total: float) -> float:
        grown = total - self._shown.get(name, 0.0)
        self._shown[name] = total
        return grown
