"""What the status page is told of a lineage and its hosts."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS, Lease, Presence, Span
from p2pmodel.logic.round_state import Phase, Proposal, RoundState
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.watching.overview import Overview
from p2pmodel.wire.signing import Key
from tests.support.lineages import begin, grow


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    lineage = begin(tmp_path / "home")
    grow(lineage, 2)
    return lineage


def lease(
    lineage: Lineage, span: Span, version: VersionId, seconds: float = LEASE_SECONDS, *, gone: bool = False
) -> Lease:
    peer = Key.generate().peer
    return Lease(peer, lineage.model, span, "fp32", (version,), 0.001, 2, gone, time.time() + seconds)


def presence(lineage: Lineage, seconds: float = LEASE_SECONDS) -> Presence:
    peer = Key.generate().peer
    return Presence(
        peer, lineage.model, (f"/ip4/192.0.2.1/tcp/1/p2p/{peer}",), "", (), ("host",), "x", time.time() + seconds
    )


def test_it_shows_who_is_there_and_nobody_else(lineage: Lineage) -> None:
    whole = Span(0, lineage.manifest.layers)
    leases = [
        lease(lineage, whole, lineage.head),
        lease(lineage, Span(0, 2), lineage.head),
        lease(lineage, whole, lineage.head, seconds=-1),
        lease(lineage, whole, lineage.head, gone=True),
    ]
    here, late = presence(lineage), presence(lineage, seconds=-1)
    view = Overview(lineage).view(leases, [here, late])
    assert [(x["start"], x["end"]) for x in view["leases"]] == [(0, 2), (0, 6)]
    assert view["coverage"] == [2, 2, 1, 1, 1, 1]
    assert [x["peer"] for x in view["peers"]] == [here.peer]
    assert view["join"] == f"p2pmodel join --peers {here.addresses[0]}"
    assert json.loads(json.dumps(view)) == view


def test_the_version_served_is_the_newest_that_all_layers_are_served_at(lineage: Lineage) -> None:
    old, new = lineage.versions[0].id, lineage.head
    some = [lease(lineage, Span(0, 6), old), lease(lineage, Span(0, 3), new)]
    both = dataclasses.replace(some[0], versions=(new, old))
    assert [v["number"] for v in Overview(lineage).view([both], [])["leases"][0]["versions"]] == ["1.0.1", "1.0.2"]
    for leases, number, coverage in (([], "1.0.2", [0] * 6), (some, "1.0.1", [1] * 6)):
        view = Overview(lineage).view(leases, [])
        assert view["model"]["served"]["number"] == number
        assert view["model"]["head"]["number"] == "1.0.2"
        assert view["coverage"] == coverage


def test_a_version_that_is_not_known_here_has_no_number(lineage: Lineage) -> None:
    view = Overview(lineage).view(
        [lease(lineage, Span(0, 6), VersionId(lineage.versions[0].candidate.result.digest))], []
    )
    assert view["leases"][0]["versions"][0]["number"] == ""


def test_versions_come_with_their_patches_verdicts_and_scores(lineage: Lineage) -> None:
    first, second = Overview(lineage).view([], [])["versions"]
    assert [first["number"], second["number"]] == ["1.0.1", "1.0.2"]
    assert all(patch["kind"] and patch["contributor"] for patch in second["patches"])
    assert [verdict["accept"] for verdict in second["verdicts"]] == [True]
    assert {"domain", "base", "parent", "candidate", "mean"} <= set(second["scores"][0])


def test_the_scores_are_of_the_first_verdict_that_has_any(lineage: Lineage) -> None:
    version = lineage.versions[-1]
    (examined,) = version.verdicts
    silent = dataclasses.replace(examined, scores=())
    lineage.versions = (dataclasses.replace(version, verdicts=(silent, examined)),)
    (shown,) = Overview(lineage).view((), ())["versions"]
    assert shown["scores"] == [dataclasses.asdict(score) for score in examined.scores]
    assert dataclasses.replace(version, verdicts=(silent,)).scores == ()


def test_a_round_with_a_candidate(lineage: Lineage) -> None:
    version = lineage.versions[-1]
    candidate, now = version.candidate, time.monotonic()
    proposal = Proposal(version.id, candidate.round, lineage.proposers[version.id][0], candidate.patches)
    state = RoundState(
        Phase.VOTING, candidate.round, candidate.parent, now - 60, now - 90, candidate.patches, candidates=(proposal,)
    )
    view = Overview(lineage).round(state)
    assert (view["number"], view["phase"]) == (candidate.round, "voting")
    assert abs(time.time() - 60 - view["since"]) < 5
    assert [patch["id"] for patch in view["patches"]] == list(candidate.patches)
    assert view["candidates"][0]["number"] == "1.0.2"
    assert [verdict["accept"] for verdict in view["candidates"][0]["verdicts"]] == [True]
    assert Overview(lineage).round(state)["since"] in (view["since"], view["since"] + 1)
