"""Two stages behind one server: sessions stay where they began, and new ones go to where the lease says."""

import threading

import pytest
import torch

from p2pmodel.domain.errors import NotFound
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.hosting.stages import HostedStage, Stages
from p2pmodel.starter import MODEL
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical

LINEAGE = canonical.digest(b"model")
LOW, HIGH = Span(0, 2), Span(1, 3)
ROOM = 100
CODEC = get_codec("fp32")


def hosted(span: Span) -> HostedStage:
    stage = load_stage(read_checkpoint(MODEL), span)
    versions = VersionTable(stage)
    versions.put(VersionId(LINEAGE), {})
    return HostedStage(stage, Runner(stage, LINEAGE, versions, max_cached_tokens=ROOM), versions)


def request(span: Span, tokens: int = 8) -> SessionRequest:
    return SessionRequest("0" * 32, LINEAGE, VersionId(LINEAGE), "fp32", span, tokens)


def test_sessions_of_both_stages_run_in_one_batch() -> None:
    low, high = hosted(LOW), hosted(HIGH)
    stages = Stages(low)
    first = stages.open(request(LOW))
    assert stages.take(high) is low
    assert stages.current is high
    second, third = stages.open(request(HIGH)), stages.open(request(LOW))
    hidden = torch.randn(1, 4, low.width, generator=torch.Generator().manual_seed(0))
    body = bytes(CODEC.encode(hidden))
    together = stages.step([(second, 0, b"", body), (first, 0, b"", body), (third, 0, b"", body)])
    alone = [stage.runner.step([(stage.runner.open(request(stage.span)), 0, b"", body)])[0] for stage in (high, low)]
    decoded = [CODEC.decode(output, 4, low.width) for output in (*together, *alone)]  # type: ignore[arg-type]
    torch.testing.assert_close(decoded[0], decoded[3])
    torch.testing.assert_close(decoded[1], decoded[4])
    torch.testing.assert_close(decoded[2], decoded[4])
    assert stages.busy == 3


def test_a_retired_stage_takes_no_new_sessions_and_ends_with_its_last() -> None:
    low, high = hosted(LOW), hosted(HIGH)
    stages = Stages(low)
    session = stages.open(request(LOW))
    stages.take(high)
    assert stages.cached_tokens == 8
    ended = threading.Event()
    stages.retire(low, ended.set)
    assert not ended.is_set()
    with pytest.raises(NotFound, match="serves layers 1:3, not 0:2"):
        stages.open(request(LOW))
    stages.close(session)
    assert ended.is_set()
    at_once = threading.Event()
    stages.take(low)
    stages.retire(high, at_once.set)
    assert at_once.is_set()


def test_the_figure_for_the_lease_follows_single_tokens() -> None:
    low = hosted(LOW)
    stages = Stages(low)
    session = stages.open(request(LOW, 60))
    token = bytes(CODEC.encode(torch.zeros(1, 1, low.width)))
    prompt = bytes(CODEC.encode(torch.zeros(1, 4, low.width)))
    stages.step([(session, 0, b"", prompt)])
    assert low.layer_seconds == low.measured
    stages.step([(session, 4, b"", token)])
    assert low.layer_seconds != low.measured
