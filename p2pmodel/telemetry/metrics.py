"""A node's metrics. docs/metrics.md is written from them.

No label ever holds the id of a peer, a request or a patch: every label takes one of a few values, so that a scrape
stays small in a swarm of any size.
"""

from collections.abc import Iterable

from p2pmodel.domain.bounds import FORWARD_SECONDS, MERGE_SECONDS, QUEUE_SECONDS, SESSIONS
from p2pmodel.domain.version import DomainScore
from p2pmodel.telemetry.swarm_view import SwarmView

DIRECTIONS = ("received", "sent")
PATCH_OUTCOMES = ("admitted", "merged", "left_out")
ROUND_OUTCOMES = ("adopted", "rejected", "abandoned", "misbehaviour")
PHASES = ("decode", "prefill", "training", "backward")
CHILDREN = ("gossip", "p2pd")
SCORED = ("base", "parent", "head", "mean")

CODEC = "name of the codec"
SECTION = "section of the exam, 64 at most"
REASON = "one word of this program's"


class Metrics(SwarmView):
    """All metrics of one node."""

    def __init__(self) -> None:
        super().__init__()
        direction = {"direction": DIRECTIONS}
        self.served_round = self.gauge(
            "p2pmodel_served_round",
            "Round that made the newest version that this node serves or holds; 0 for the base.",
        )
        self.peers_connected = self.gauge("p2pmodel_peers_connected", "Peers that this node has a connection to.")
        self.clock_offset = self.gauge(
            "p2pmodel_clock_offset_seconds",
            "Of the measured neighbour whose clock differs most from this node's: how far it is ahead.",
        )
        self.link_delay = self.gauge(
            "p2pmodel_link_delay_seconds",
            "One way to the neighbours that come next on a route, as last measured.",
            {"statistic": ("min", "median", "max")},
        )
        self._hosting()
        self.blob_bytes = self.counter("p2pmodel_blob_bytes", "Records and blobs over blob streams.", direction)
        self.blobs = self.counter("p2pmodel_blobs", "Records and blobs, whole ones, over blob streams.", direction)
        self._gossip()
        self._rounds()
        self.gpu_memory = self.gauge(
            "p2pmodel_gpu_memory_bytes",
            "Memory of the GPU that this node computes on: what it holds itself, and what is free for anybody.",
            {"state": ("held", "free")},
        )
        self.gpu_busy = self.gauge(
            "p2pmodel_gpu_busy_ratio",
            "Share of the last second or less in which that GPU computed anything, for anybody. Not there without a "
            "GPU, or without the library nvidia-ml-py.",
            {"gpu": "number of the GPU that this node computes on"},
        )
        self.children_memory = self.gauge(
            "p2pmodel_child_resident_memory_bytes", "Resident memory of a child process.", {"process": CHILDREN}
        )
        self.children_cpu = self.counter(
            "p2pmodel_child_cpu_seconds", "CPU time of a child process, of those before it too.", {"process": CHILDREN}
        )

    def _hosting(self) -> None:
        self.layers_hosted = self.gauge("p2pmodel_layers_hosted", "Layers that this node serves.")
        self.span = self.gauge(
            "p2pmodel_hosted_span",
            "First layer that this node serves, and the one behind the last.",
            {"end": ("first", "behind")},
        )
        self.layer_seconds = self.gauge(
            "p2pmodel_layer_seconds", "Time of one hosted layer for one token of one session, as the lease says it."
        )
        self.sessions_open = self.gauge("p2pmodel_sessions_open", "Sessions that have a KV cache here.")
        self.sessions_opened = self.counter("p2pmodel_sessions_opened", "Sessions that have begun here.")
        self.sessions_failed = self.counter(
            "p2pmodel_sessions_failed", "Sessions that were refused here, or that an error ended."
        )
        self.tokens = self.counter("p2pmodel_tokens_processed", "Positions computed by the hosted span.")
        self.step_seconds = self.counter("p2pmodel_step_seconds", "Time spent in forwards of the hosted span.")
        self.forward_seconds = self.tallied(
            "p2pmodel_forward_seconds",
            "Time of one forward of the hosted span, for all sessions in it, or of one backward.",
            FORWARD_SECONDS,
            "phase",
            PHASES,
        )
        self.queue_seconds = self.tallied(
            "p2pmodel_queue_seconds", "Time that a step waited here, from being read to being computed.", QUEUE_SECONDS
        )
        self.batch_sessions = self.tallied("p2pmodel_batch_sessions", "Sessions that one forward computed.", SESSIONS)
        self.cache_tokens = self.gauge(
            "p2pmodel_cache_tokens",
            "Positions of KV cache: promised to open sessions, kept of ended ones, and free for new ones.",
            {"state": ("promised", "retained", "free")},
        )
        self.cache_bytes = self.gauge(
            "p2pmodel_cache_bytes",
            "The same in memory, as measured on this model; what is kept of ended sessions gives way to new ones.",
            {"state": ("promised", "retained", "free")},
        )
        self.graph_bytes = self.gauge("p2pmodel_graph_bytes", "Memory of micro-batches that wait for their gradients.")
        self.gradients = self.counter("p2pmodel_gradients", "Micro-batches whose gradients this node answered.")
        self.activation_bytes = self.counter(
            "p2pmodel_activation_bytes", "Frames of activation streams, with their headers.", {"direction": DIRECTIONS}
        )
        labels = {"codec": CODEC, "direction": DIRECTIONS}
        self.codec_bytes = self.counter("p2pmodel_codec_bytes", "Encoded hidden states, by codec.", labels)
        self.codec_raw_bytes = self.counter(
            "p2pmodel_codec_raw_bytes", "The same hidden states as they would be in fp32.", labels
        )

    def _gossip(self) -> None:
        self.announcements = self.counter(
            "p2pmodel_announcements", "Announcements over gossip.", {"direction": DIRECTIONS}
        )
        self.announcements_refused = self.counter(
            "p2pmodel_announcements_refused", "Announcements of others that gossip did not pass on.", {"reason": REASON}
        )
        self.gossip_peers = self.gauge("p2pmodel_gossip_peers", "Peers that the gossip child is connected to.")
        self.gossip_restarts = self.counter(
            "p2pmodel_gossip_restarts", "Times that the gossip child was started again."
        )
        self.refused = self.counter(
            "p2pmodel_records_refused",
            "Records that failed a check, by kind and by the check, in one word.",
            {"kind": "patch, candidate, verdict", "reason": REASON},
        )
        self.repaired = self.counter(
            "p2pmodel_records_repaired", "Records that gossip did not bring, found by asking a peer what it has."
        )

    def _rounds(self) -> None:
        self.patches = self.counter("p2pmodel_patches", "Patches, by what became of them.", {"outcome": PATCH_OUTCOMES})
        self.rounds = self.counter(
            "p2pmodel_rounds",
            "Rounds, by how they ended; misbehaviour: a maintainer signed two candidates of one.",
            {"outcome": ROUND_OUTCOMES},
        )
        self.merge_seconds = self.histogram(
            "p2pmodel_merge_seconds", "Time to merge the patches of one candidate, once.", MERGE_SECONDS
        )
        self.exam_score = self.gauge(
            "p2pmodel_exam_score",
            "Exam of the head version, of its parent, of the base, and of the plain mean of the same patches; lower is "
            "better: nats per byte, or the share of cases that fail.",
            {"section": SECTION, "of": SCORED},
        )

    def set_exam(self, scores: Iterable[DomainScore]) -> None:
        """Of the head version; they replace those before."""
        self.exam_score.clear()
        for score in scores:
            for of, value in (
                ("base", score.base),
                ("parent", score.parent),
                ("head", score.candidate),
                ("mean", score.mean),
            ):
                if value is not None:
                    self.exam_score.labels(score.domain, of).set(value)
