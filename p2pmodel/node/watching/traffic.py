"""Bytes that a node has sent and received, by what they were."""

from typing import TYPE_CHECKING

from p2pmodel.node.lineages.exchange import Exchange
from p2pmodel.swarm.blobs import BlobServer

if TYPE_CHECKING:
    from p2pmodel.node.hosting.expert_hosting import ExpertHosting
    from p2pmodel.node.hosting.hosting import Hosting
    from p2pmodel.node.hosting.trunk import Trunk


class Traffic:
    def __init__(
        self,
        blobs: BlobServer,
        exchange: Exchange,
        hosting: "Hosting | None",
        experts: "ExpertHosting | None" = None,
        trunk: "Trunk | None" = None,
    ) -> None:
        self._blobs, self._exchange, self._hosting = blobs, exchange, hosting
        self._experts, self._trunk = experts, trunk

    def totals(self) -> dict[str, int]:
        """Since the node began: `activations_sent`, `activations_received`, `blobs_sent`, `blobs_received`."""
        parts = [
            part.stats
            for part in (self._hosting, self._experts, self._trunk.dispatcher if self._trunk else None)
            if part is not None
        ]
        return {
            "activations_sent": sum(stats.bytes_out for stats in parts),
            "activations_received": sum(stats.bytes_in for stats in parts),
            "blobs_sent": self._blobs.bytes_sent,
            "blobs_received": self._exchange.bytes_received,
        }

    @property
    def blobs(self) -> dict[str, int]:
        """Whole ones: `sent`, `received`."""
        return {"sent": self._blobs.sent, "received": self._exchange.blobs_received}
