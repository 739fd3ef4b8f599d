"""What a gateway's answers and requests add to its metrics."""

import contextlib
from collections.abc import Callable, Iterator

from p2pmodel.node.serving.answering import Writer
from p2pmodel.telemetry.gateway import GatewayMetrics

API = "/v1/"


@contextlib.contextmanager
def metered(writer: Writer, metrics: GatewayMetrics) -> Iterator[None]:
    """Around `writer.run`, in its thread."""
    outcome = "failed"
    try:
        yield
        outcome = "completed"
    finally:
        metrics.answers.labels("cancelled" if writer.cancelled else outcome).inc()
        metrics.prompt_tokens.inc(writer.prompt_tokens)
        metrics.reused_tokens.inc(writer.reused)
        metrics.generated_tokens.inc(writer.tokens)
        metrics.failovers.inc(writer.failovers)
        metrics.activation_bytes.labels("sent").inc(writer.bytes_sent)
        metrics.activation_bytes.labels("received").inc(writer.bytes_received)
        if writer.tokens:
            metrics.first_token_seconds.observe(writer.first - writer.began)
        if writer.tokens > 1:
            metrics.output_token_seconds.observe((writer.latest - writer.first) / (writer.tokens - 1))


def request_counter(metrics: GatewayMetrics) -> Callable[[str, int], None]:
    """Counts those to the API, and those that went nowhere; pages and scrapes are nobody's concern."""

    def answered(route: str, status: int) -> None:
        if route.startswith(API) or route == "other":
            metrics.requests.labels(route, str(status)).inc()

    return answered
