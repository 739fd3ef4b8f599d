"""A gateway's metrics: what clients get of the swarm, and how fast. docs/metrics.md is written from them."""

from p2pmodel.domain.bounds import FIRST_TOKEN_SECONDS, OUTPUT_TOKEN_SECONDS, WAIT_SECONDS
from p2pmodel.telemetry.metrics import DIRECTIONS
from p2pmodel.telemetry.swarm_view import SwarmView

ANSWER_OUTCOMES = ("completed", "failed", "cancelled")
STATUSES = "HTTP's"


class GatewayMetrics(SwarmView):
    """All metrics of one gateway. Thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter(
            "p2pmodel_http_requests",
            "Requests to the API, by the status that they were answered with.",
            {"route": "of the API, or `other`", "status": STATUSES},
        )
        self.answers = self.counter(
            "p2pmodel_answers",
            "Answers by how they ended; cancelled: the client hung up.",
            {"outcome": ANSWER_OUTCOMES},
        )
        self.at_work = self.gauge("p2pmodel_answers_at_work", "Answers that are being made.")
        self.waiting = self.gauge("p2pmodel_answers_waiting", "Answers that wait for their turn.")
        self.wait_seconds = self.histogram(
            "p2pmodel_wait_seconds",
            "Time that a request waited for its turn, before anything was computed.",
            WAIT_SECONDS,
        )
        self.first_token_seconds = self.histogram(
            "p2pmodel_first_token_seconds", "Time from an answer's turn to its first token.", FIRST_TOKEN_SECONDS
        )
        self.output_token_seconds = self.histogram(
            "p2pmodel_output_token_seconds",
            "Of an answer's tokens after the first: the mean time of one. An answer of one token has none.",
            OUTPUT_TOKEN_SECONDS,
        )
        self.prompt_tokens = self.counter("p2pmodel_prompt_tokens", "Tokens of prompts, for each answer to them.")
        self.reused_tokens = self.counter(
            "p2pmodel_reused_tokens", "Of these, tokens that the stages knew from an earlier session."
        )
        self.generated_tokens = self.counter("p2pmodel_generated_tokens", "Tokens of answers.")
        self.failovers = self.counter(
            "p2pmodel_failovers", "Times that an answer went on over another route, since a peer failed."
        )
        self.activation_bytes = self.counter(
            "p2pmodel_activation_bytes", "Frames of activation streams, with their headers.", {"direction": DIRECTIONS}
        )
