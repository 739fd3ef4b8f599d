"""What every member of a swarm sees of it: nodes and gateways show these under the same names."""

from collections.abc import Sequence

from p2pmodel.telemetry.families import Families

LAYER = "0 to the model's layers - 1"


class SwarmView(Families):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.gauge("p2pmodel_layers", "Layers of the model.")
        self.layers_covered = self.gauge(
            "p2pmodel_layers_covered",
            "Layers that a live lease serves at the head version; fewer than p2pmodel_layers: nobody can use it.",
        )
        self.layer_replicas = self.gauge(
            "p2pmodel_layer_replicas", "Live leases that serve a layer at the head version.", {"layer": LAYER}
        )
        self.leases = self.gauge("p2pmodel_leases", "Live leases on any span, at any version.")
        self.presences = self.gauge("p2pmodel_peers_present", "Peers that say they take part in the model.")
        self.head = self.info("p2pmodel_head_version", "Number of the newest version that is known.", {"number": "one"})
        self.head_round = self.gauge(
            "p2pmodel_head_round", "Round that made the newest version that is known; 0 for the base."
        )

    def set_head(self, number: str, round: int) -> None:
        """`number`: of the head version, such as `1.0.2`; it replaces the one before it."""
        self.head.info({"number": number})
        self.head_round.set(round)

    def set_replicas(self, replicas: Sequence[int]) -> None:
        """By layer."""
        self.layers.set(len(replicas))
        self.layers_covered.set(sum(1 for count in replicas if count))
        for layer, count in enumerate(replicas):
            self.layer_replicas.labels(str(layer)).set(count)
