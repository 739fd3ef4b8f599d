"""A node's metrics. Names are `p2pmodel_…` in base units, counters end in `_total`, and stay as they are once released.

No label ever holds the id of a peer, a request or a patch: every label takes one of the few values given here, so that
a scrape stays small in a swarm of any size. docs/metrics.md has the list.
"""

import errno
import platform
import threading
from collections.abc import Sequence
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from p2pmodel import __version__
from p2pmodel.domain.errors import Busy, UsageError

DIRECTIONS = ("received", "sent")
PATCH_OUTCOMES = ("admitted", "merged", "left_out")
ROUND_OUTCOMES = ("adopted", "rejected", "abandoned", "misbehaviour")

_MERGE_BUCKETS = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Metrics:
    """All metrics of one node, in a registry of its own. Directions and outcomes are there, at 0, from the
    start, so that a rate never misses their first increment."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.build = Info("p2pmodel_build", "Version of p2pmodel and of Python.", registry=registry)
        self.build.info({"version": __version__, "python": platform.python_version()})

        self.peers_connected = Gauge(
            "p2pmodel_peers_connected", "Peers that this node has a connection to.", registry=registry
        )
        self.layers = Gauge("p2pmodel_layers", "Layers of the model that this node takes part in.", registry=registry)
        self.layers_covered = Gauge(
            "p2pmodel_layers_covered",
            "Layers of it that at least one live lease serves at the head version.",
            registry=registry,
        )
        self.layers_hosted = Gauge("p2pmodel_layers_hosted", "Layers of it that this node serves.", registry=registry)
        self.sessions_open = Gauge("p2pmodel_sessions_open", "Sessions that have a KV cache here.", registry=registry)
        self.tokens = Counter(
            "p2pmodel_tokens_processed", "Positions computed by the span that this node serves.", registry=registry
        )
        self.step_seconds = Counter(
            "p2pmodel_step_seconds", "Time spent in forwards of the span that this node serves.", registry=registry
        )
        self.activation_bytes = Counter(
            "p2pmodel_activation_bytes",
            "Encoded hidden states over activation streams.",
            ["direction"],
            registry=registry,
        )
        self.blob_bytes = Counter(
            "p2pmodel_blob_bytes", "Records and blobs over blob streams.", ["direction"], registry=registry
        )
        self.announcements = Counter(
            "p2pmodel_announcements", "Announcements over gossip.", ["direction"], registry=registry
        )
        self.gossip_restarts = Counter(
            "p2pmodel_gossip_restarts", "Times that the gossip child was started again.", registry=registry
        )
        self.patches = Counter("p2pmodel_patches", "Patches, by what became of them.", ["outcome"], registry=registry)
        self.refused = Counter(
            "p2pmodel_records_refused",
            "Records that failed a check, by kind and by the check, in one word.",
            ["kind", "reason"],
            registry=registry,
        )
        self.repaired = Counter(
            "p2pmodel_records_repaired",
            "Records that gossip did not bring, found by asking a peer what it has.",
            registry=registry,
        )
        self.rounds = Counter(
            "p2pmodel_rounds",
            "Rounds, by how they ended; misbehaviour: a maintainer signed two candidates of one.",
            ["outcome"],
            registry=registry,
        )
        self.merge_seconds = Histogram(
            "p2pmodel_merge_seconds",
            "Time to merge the patches of one candidate, once.",
            buckets=_MERGE_BUCKETS,
            registry=registry,
        )
        self.head = Info("p2pmodel_head_version", "Number of the head version.", registry=registry)

        _declare(self.activation_bytes, DIRECTIONS)
        _declare(self.blob_bytes, DIRECTIONS)
        _declare(self.announcements, DIRECTIONS)
        _declare(self.patches, PATCH_OUTCOMES)
        _declare(self.rounds, ROUND_OUTCOMES)

    def set_head(self, number: str) -> None:
        """`number`: of the head version, such as `1.0.2`; it replaces the one before it."""
        self.head.info({"number": number})

    def serve(self, port: int, host: str = "127.0.0.1") -> "MetricsServer":
        """Serves `/metrics` from a thread; port 0 takes any free one.

        Raises Busy when the port is in use, UsageError when the address cannot be listened on.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise Busy(f"Port {port} is in use.", "Choose another with --metrics-port.") from None
            reason = error.strerror if isinstance(error, OSError) else "it is no port"
            raise UsageError(f"Metrics cannot be served on {host}:{port}: {reason}.") from None
        return MetricsServer(server, thread)


class MetricsServer:
    """A running `/metrics`; `port` is the one that it listens on."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self.port: int = server.server_port
        self._server = server
        self._thread = thread

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _declare(counter: Counter, values: Sequence[str]) -> None:
    for value in values:
        counter.labels(value)
