"""Bytes that a node has sent and received, by what they were."""

from typing import TYPE_CHECKING

from p2pmodel.node.lineages.exchange import Exchange
from p2pmodel.swarm.blobs import BlobServer

if TYPE_CHECKING:
    from p2pmodel.node.hosting.hosting import Hosting


class Traffic:
    def __init__(self, blobs: BlobServer, exchange: Exchange, hosting: "Hosting | None") -> None:
        self._blobs, self._exchange, self._hosting = blobs, exchange, hosting

    def totals(self) -> dict[str, int]:
        """Since the node began: `activations_sent`, `activations_received`, `blobs_sent`, `blobs_received`."""
        stats = self._hosting.stats if self._hosting else None
        return {
            "activations_sent": stats.bytes_out if stats else 0,
            "activations_received": stats.bytes_in if stats else 0,
            "blobs_sent": self._blobs.bytes_sent,
            "blobs_received": self._exchange.bytes_received,
        }

    @property
    def blobs(self) -> dict[str, int]:
        """Whole ones: `sent`, `received`."""
        return {"sent": self._blobs.sent, "received": self._exchange.blobs_received}
