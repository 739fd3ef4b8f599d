"""Metrics as a scrape sees them, and logs as they arrive."""

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import datetime

import pytest
from prometheus_client.parser import text_string_to_metric_families

from p2pmodel.cli.versioning import score_table
from p2pmodel.domain.bounds import FORWARD_SECONDS
from p2pmodel.domain.errors import InvalidInput, UsageError
from p2pmodel.domain.tally import Tally
from p2pmodel.domain.version import DomainScore, Verdict
from p2pmodel.telemetry import logs
from p2pmodel.telemetry.families import Growth
from p2pmodel.telemetry.gateway import GatewayMetrics
from p2pmodel.telemetry.metrics import Metrics
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from scripts.generate import metrics as generated
from scripts.generate import outdated

KEY, MODEL = Key.generate(), canonical.digest(b"model")
ALLOWED_LABELS = {
    *("direction", "outcome", "kind", "reason", "le", "version", "python", "number", "layer", "end", "phase", "state"),
    *("statistic", "codec", "process", "section", "of", "route", "status", "gpu"),
}


def scrape(metrics: Metrics) -> str:
    return metrics.exposition().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_shows_what_was_counted() -> None:
    metrics = Metrics()
    metrics.tokens.inc(3)
    metrics.layers_covered.set(5)
    metrics.activation_bytes.labels("sent").inc(1024)
    metrics.merge_seconds.observe(0.4)
    metrics.set_head("1.0.0", 0)
    metrics.set_head("1.0.1", 1)
    found = samples(scrape(metrics))
    assert found["p2pmodel_tokens_processed_total", ()] == 3
    assert found["p2pmodel_layers_covered", ()] == 5
    assert found["p2pmodel_activation_bytes_total", (("direction", "sent"),)] == 1024
    assert found["p2pmodel_activation_bytes_total", (("direction", "received"),)] == 0
    assert found["p2pmodel_merge_seconds_bucket", (("le", "0.5"),)] == 1
    assert [key for key in found if key[0] == "p2pmodel_head_version_info"] == [
        ("p2pmodel_head_version_info", (("number", "1.0.1"),))
    ]


@pytest.mark.parametrize("made", [Metrics, GatewayMetrics])
def test_every_metric_is_named_by_the_rules_and_documented(made: type[Metrics | GatewayMetrics]) -> None:
    metrics = made()
    described = {family.name: family for family in metrics.made}
    found = text_string_to_metric_families(metrics.exposition().decode())
    families = [family for family in found if not family.name.startswith("process_")]
    assert len(families) == len(described)
    for family in families:
        assert family.name.startswith("p2pmodel_")
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|millis|kb|mb|minutes)(_|$)", family.name)
        assert {label for sample in family.samples for label in sample.labels} <= ALLOWED_LABELS
        kind = described[family.name + ("_total" if family.type == "counter" else "")].kind
        assert family.type == ("gauge" if kind == "info" else kind)


def test_the_page_of_metrics_is_up_to_date_and_no_released_metric_is_gone() -> None:
    assert not [*outdated("metrics")]


def test_a_released_metric_cannot_be_changed_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    now, gone = generated.released([]), "p2pmodel_gone_total counter outcome"
    assert "p2pmodel_patches_total counter outcome" in now
    with pytest.raises(SystemExit, match="p2pmodel_gone_total"):
        generated.released([*now, gone])
    monkeypatch.setitem(generated.DEPRECATED, gone, "since 9.9: use p2pmodel_patches_total")
    assert generated.released([gone]) == sorted([*now, gone])
    assert gone in generated.document()


def test_a_plain_mean_without_scores_is_absent() -> None:
    verdict = Verdict(KEY.peer, MODEL, 1, MODEL, True, "", (DomainScore("xml", 1.0, 0.9, 0.8, None),))
    assert records.open_verdict(KEY.sign("verdict", verdict)) == verdict
    metrics = Metrics()
    metrics.set_exam(verdict.scores)
    shown = {dict(labels)["of"]: value for (name, labels), value in samples(scrape(metrics)).items() if "exam" in name}
    assert shown == {"base": 1.0, "parent": 0.9, "head": 0.8}
    assert score_table(verdict.scores, "1.0.1").split()[-1] == "-"


def test_a_tally_is_shown_as_a_histogram() -> None:
    metrics, tally = Metrics(), Tally(FORWARD_SECONDS)
    metrics.forward_seconds.follow({"decode": tally})
    for value in (0.0005, 0.0006, 99.0):
        tally.add(value)
    found = samples(scrape(metrics))

    def bucket(le: str) -> float:
        return found["p2pmodel_forward_seconds_bucket", (("le", le), ("phase", "decode"))]

    assert (bucket("0.0005"), bucket("0.001"), bucket("10.0"), bucket("+Inf")) == (1, 2, 2, 3)
    assert found["p2pmodel_forward_seconds_count", (("phase", "decode"),)] == tally.count == 3
    assert found["p2pmodel_forward_seconds_count", (("phase", "prefill"),)] == 0


def test_totals_of_others_become_counters_and_may_begin_anew() -> None:
    metrics, growth = Metrics(), Growth()
    for total in (3, 5, 5, 2):
        growth.carry(metrics.tokens, total)
        growth.carry(metrics.blob_bytes.labels("sent"), 10 * total)
    found = samples(scrape(metrics))
    assert found["p2pmodel_tokens_processed_total", ()] == 7
    assert found["p2pmodel_blob_bytes_total", (("direction", "sent"),)] == 70


def test_two_nodes_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.tokens.inc()
    assert samples(scrape(other))["p2pmodel_tokens_processed_total", ()] == 0


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("restored_logging")
def test_logs_are_one_plain_line_each_in_a_pipe() -> None:
    stream = io.StringIO()
    logs.configure("info", stream)
    logging.getLogger("p2pmodel.node").info("a peer says %s", "this\nand\rthat")
    logging.getLogger("p2pmodel.node").debug("hidden")
    assert len(stream.getvalue().splitlines()) == 1
    assert "INFO    p2pmodel.node: a peer says this\\nand\\rthat" in stream.getvalue()


@pytest.mark.usefixtures("restored_logging")
def test_third_parties_are_quiet_unless_one_debugs() -> None:
    stream = io.StringIO()
    logs.configure("INFO", stream)
    logging.getLogger("hivemind.dht").warning("chatter")
    logging.getLogger("libp2p.pubsub").error("broken")
    assert "chatter" not in stream.getvalue()
    assert "broken" in stream.getvalue()
    logs.configure("DEBUG", stream)
    logging.getLogger("hivemind.dht").warning("chatter")
    assert stream.getvalue().count("chatter") == 1


@pytest.mark.usefixtures("restored_logging")
def test_a_terminal_gets_rich_logs() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    logs.configure("INFO", stream)
    logging.getLogger("p2pmodel").info("hello")
    assert "hello" in stream.getvalue()


def test_an_unknown_level_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="WARNING"):
        logs.configure("LOUD")


@pytest.mark.usefixtures("restored_logging")
def test_logs_for_programs_are_one_json_object_a_line() -> None:
    stream = io.StringIO()
    logs.configure("info", stream, "json")
    logger = logging.getLogger("p2pmodel.node")
    logger.info("a peer says %s", "this\nand\rthat, \udc80 θ")
    try:
        raise ValueError("a defect")
    except ValueError:
        logger.exception("it failed")
    assert logs.report(InvalidInput("This is no text.", "Give another one."))
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(one["level"], one["logger"]) for one in said] == [
        ("INFO", "p2pmodel.node"),
        ("ERROR", "p2pmodel.node"),
        ("ERROR", "p2pmodel"),
    ]
    assert said[0]["message"] == "a peer says this\nand\rthat, \udc80 θ"
    assert "ValueError: a defect" in said[1]["traceback"]
    assert said[2]["message"] == "This is no text. Give another one."
    assert all(abs(datetime.fromisoformat(one["time"]).timestamp() - time.time()) < 60 for one in said)
    assert all(one["time"].endswith("Z") for one in said)
    with pytest.raises(UsageError, match="json"):
        logs.configure("INFO", stream, "yaml")


@pytest.mark.usefixtures("restored_logging")
def test_people_get_errors_without_a_log() -> None:
    logs.configure("INFO", io.StringIO())
    assert not logs.report(InvalidInput("This is no text."))
