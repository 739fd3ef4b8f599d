"""Going back to an old version: who may, what is checked, and the whole of it with a real node."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.domain.errors import NotRunning, Rejected, UsageError
from p2pmodel.domain.version import RESTORE
from p2pmodel.node.lineages.intake import needed_blobs
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.rounds.asides import agree_to_rollback, propose_rollback
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.store.home import Home
from p2pmodel.wire.signing import Key
from tests.support.factories import candidate as some_candidate
from tests.support.lineages import accept, add_patch, begin, grow


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    lineage = begin(tmp_path / "home")
    grow(lineage, 2)
    return lineage


def test_a_rollback_costs_no_storage_and_is_accepted_by_who_agreed(lineage: Lineage) -> None:
    old, head = lineage.versions[0], lineage.head
    _, version = propose_rollback(lineage, old.id)
    candidate = lineage.candidates[version]
    assert candidate.restores
    assert candidate.parent == head
    assert candidate.result == old.candidate.result
    assert str(candidate.number) == "1.0.3"
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)
    verdict = maintainer.examine(version)
    assert verdict.accept
    assert len(verdict.scores) == 6
    lineage.home.refs.delete(f"models/{lineage.model}/rollback")
    refused = maintainer.examine(version)
    assert not refused.accept
    assert refused.reason == "its maintainer did not agree to go back"
    assert refused.scores == verdict.scores


def test_the_base_can_be_restored(lineage: Lineage) -> None:
    _, version = propose_rollback(lineage, lineage.model)
    candidate = lineage.candidates[version]
    assert lineage.restored_by(candidate) == lineage.model
    accept(lineage, candidate)
    assert lineage.head == version
    for command in ("log", "show"):
        said = CliRunner().invoke(app, [command, "--home", str(lineage.home.path)]).stdout
        assert "restores 1.0.0" in said


def test_a_rollback_that_is_refused_changes_nothing_of_what_was_agreed(lineage: Lineage) -> None:
    _, first = propose_rollback(lineage, lineage.versions[0].id)
    with pytest.raises(Rejected, match=f"accepted version {first[:10]}"):
        propose_rollback(lineage, lineage.model)
    assert lineage.agrees_to(lineage.candidates[first])


def test_agreement_is_to_one_step(lineage: Lineage) -> None:
    agree_to_rollback(lineage, lineage.model)
    _, version = propose_rollback(lineage, lineage.versions[0].id)
    candidate = lineage.candidates[version]
    assert lineage.agrees_to(candidate)
    agree_to_rollback(lineage, lineage.model)
    assert not lineage.agrees_to(candidate)


def test_only_values_of_older_versions_can_be_restored(lineage: Lineage) -> None:
    add_patch(lineage, Key.generate(), 77)
    _, version = propose_rollback(lineage, lineage.versions[0].id)
    good = lineage.candidates[version]
    for result in (lineage.versions[1].candidate.result, next(iter(lineage.patches.values())).fisher):
        record = lineage.home.key.sign("candidate", dataclasses.replace(good, result=result))
        with pytest.raises(Rejected) as refused:
            needed_blobs(lineage, "candidate", record)
        assert refused.value.reason == "merge"


def test_only_maintainers_go_back_and_only_to_something_else(lineage: Lineage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already"):
        propose_rollback(lineage, lineage.head)
    stranger = Home.open(tmp_path / "stranger")
    stranger.objects.put(lineage.home.objects.load(lineage.model))
    with pytest.raises(Rejected, match="none of the maintainers"):
        agree_to_rollback(Lineage(stranger, lineage.model), lineage.model)


def test_a_rollback_settles_no_patches() -> None:
    ordinary = some_candidate()
    with pytest.raises(ValueError, match="settles no patches"):
        dataclasses.replace(ordinary, merge=RESTORE)
    assert dataclasses.replace(ordinary, merge=RESTORE, patches=()).restores
    with pytest.raises(ValueError, match="at least one"):
        dataclasses.replace(ordinary, patches=())


def test_without_a_node_nothing_is_proposed(lineage: Lineage) -> None:
    before = set(lineage.candidates)
    result = CliRunner().invoke(app, ["rollback", "1.0.1", "--home", str(lineage.home.path)])
    assert isinstance(result.exception, NotRunning)
    lineage.refresh()
    assert set(lineage.candidates) == before


def test_a_node_adopts_the_rollback_that_its_maintainer_asks_for(lineage: Lineage) -> None:
    home = lineage.home.path
    with LocalSwarm(home.parent, keep=False) as swarm:
        node = swarm.start("home", "--model", lineage.model, "--layers", "none", "--maintain", "--threads", "1")
        node.wait_until_serving(time.monotonic() + 90)
        result = CliRunner().invoke(app, ["rollback", "1.0.1", "--home", str(home)])
        assert result.exit_code == 0, result.output
        swarm.wait_for_head("1.0.3", 60)
    lineage.refresh()
    old, new = (version_state(lineage, v.id) for v in (lineage.versions[0], lineage.versions[2]))
    assert all(torch.equal(old[name], new[name]) for name in old)
    proven = CliRunner().invoke(app, ["version", "verify", "--home", str(home)]).stdout
    assert "1.0.3" in proven
    assert "3 versions after the base" in proven
    said = CliRunner().invoke(app, ["log", "--home", str(home)]).stdout
    assert "restores 1.0.1" in said
