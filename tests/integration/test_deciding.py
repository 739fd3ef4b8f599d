"""What a home says of candidates: amendments proposed, looked at and decided, without any node."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.domain.errors import InvalidInput, NotFound, NotRunning, Rejected, UsageError
from p2pmodel.domain.model import Amendment
from p2pmodel.node.lineages.intake import needed_blobs, store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.rounds.amending import decide, find_candidate, next_round, propose
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.node.rounds.roundview import look
from p2pmodel.store.home import Home
from p2pmodel.wire.signing import Key
from tests.lineages import add_patch, begin, grow


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    return begin(tmp_path / "home")


def amendment(lineage: Lineage, **changes: object) -> Amendment:
    return dataclasses.replace(lineage.manifest.amendment, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("versions", [0, 1])
def test_an_amendment_is_a_version_with_its_parents_values(lineage: Lineage, versions: int) -> None:
    grow(lineage, versions)
    limits = dataclasses.replace(lineage.manifest.limits, regression_tolerance=0.125)
    _, version = propose(lineage, amendment(lineage, limits=limits))
    assert lineage.manifest.limits.regression_tolerance != 0.125
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)
    verdict = maintainer.examine(version)
    assert verdict.accept
    store(lineage, "verdict", lineage.home.key.sign("verdict", verdict), ())
    before = version_state(lineage, lineage.head)
    lineage.refresh()
    assert lineage.head == version
    assert lineage.manifest.limits.regression_tolerance == 0.125
    assert lineage.founding.limits.regression_tolerance == 0.005
    assert all(value.equal(before[slot]) for slot, value in version_state(lineage, version).items())
    proven = CliRunner().invoke(app, ["version", "verify", "--home", str(lineage.home.path)])
    assert proven.exit_code == 0, proven.output
    grow(lineage, 1)
    assert len(lineage.versions) == versions + 2


def test_what_is_proposed_is_shown(lineage: Lineage) -> None:
    other = Key.generate().peer
    both = tuple(sorted((lineage.home.key.peer, other)))
    patch = add_patch(lineage, Key.generate(), 1)
    _, version = propose(lineage, amendment(lineage, maintainers=both, threshold=2))
    view = look(lineage)
    assert view.patches == (patch,)
    (candidate,) = view.candidates
    assert candidate.what == f"amends maintainer {other} comes; threshold 1 to 2"
    assert candidate.decision == "approved"
    assert candidate.silent == both
    shown = CliRunner().invoke(app, ["round", "show", "--home", str(lineage.home.path)]).stdout
    assert version[:10] in shown
    assert f"needs        2 of {', '.join(both)}" in shown


def test_who_would_become_a_maintainer_signs_for_itself(lineage: Lineage, tmp_path: Path) -> None:
    guest = Home.open(tmp_path / "guest")
    both = tuple(sorted((lineage.home.key.peer, guest.key.peer)))
    stored, version = propose(lineage, amendment(lineage, maintainers=both))
    theirs = Lineage.create(guest, lineage.home.objects.load(lineage.model))
    record = lineage.home.objects.load(stored)
    for ref in needed_blobs(theirs, "candidate", record):
        guest.objects.put(lineage.home.objects.load(ref.digest))
    store(theirs, "candidate", record, needed_blobs(theirs, "candidate", record))
    theirs.refresh()
    assert find_candidate(theirs, version[:8]) == version
    assert decide(theirs, version, True, "") in theirs.verdicts
    with pytest.raises(Rejected, match="already"):
        decide(theirs, version, False, "no")
    assert decide(lineage, version, False, "not now") is None
    assert lineage.decision(version) == (False, "not now")


def test_what_cannot_be_decided_is_refused(lineage: Lineage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already"):
        propose(lineage, lineage.manifest.amendment)
    with pytest.raises(NotFound, match="no candidate"):
        find_candidate(lineage, "0123456789")
    _, version = propose(
        lineage, amendment(lineage, limits=dataclasses.replace(lineage.manifest.limits, max_patch_bytes=9))
    )
    assert next_round(lineage) == 2
    with pytest.raises(InvalidInput, match="reason"):
        decide(lineage, version, False, "")
    stranger = Home.open(tmp_path / "stranger")
    theirs = Lineage.create(stranger, lineage.home.objects.load(lineage.model))
    with pytest.raises(Rejected, match="none of the maintainers"):
        propose(theirs, amendment(lineage, threshold=1))
    home = ["--home", str(lineage.home.path)]
    for command in (["round", "approve", version], ["model", "amend", "--threshold", "1"]):
        assert isinstance(CliRunner().invoke(app, [*command, *home]).exception, NotRunning)


def test_a_patch_without_weight_is_left_out(lineage: Lineage) -> None:
    patch = add_patch(lineage, Key.generate(), 1)
    result = CliRunner().invoke(app, ["round", "weigh", f"{patch}=0", "--home", str(lineage.home.path)])
    assert result.exit_code == 0, result.output
    assert lineage.weight_of(patch) == 0
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)
    assert maintainer.propose(1, lineage.head, (patch,)) is None
