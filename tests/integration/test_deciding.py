"""What a home says of candidates: amendments proposed, looked at and decided, without any node."""

import dataclasses
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.domain.errors import InvalidInput, NotFound, NotRunning, Rejected, UsageError
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.model import Amendment
from p2pmodel.domain.version import DomainScore
from p2pmodel.node.lineages.intake import needed_blobs, store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.rounds.asides import next_round, propose_amendment
from p2pmodel.node.rounds.deciding import decide, find_candidate
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.node.rounds.roundview import look
from p2pmodel.store.home import Home
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin, grow


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    return begin(tmp_path / "home")


def amendment(lineage: Lineage, **changes: object) -> Amendment:
    return dataclasses.replace(lineage.manifest.amendment, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("versions", [0, 1])
def test_an_amendment_is_a_version_with_its_parents_values(lineage: Lineage, versions: int) -> None:
    grow(lineage, versions)
    limits = dataclasses.replace(lineage.manifest.limits, regression_tolerance=0.125)
    _, version = propose_amendment(lineage, amendment(lineage, limits=limits))
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
    _, version = propose_amendment(lineage, amendment(lineage, maintainers=both, threshold=2))
    with pytest.raises(NotFound) as unknown:
        lineage.find_version(version[:10])
    assert "round show" in str(unknown.value.hint)
    view = look(lineage)
    assert view.patches == (patch,)
    (candidate,) = view.candidates
    assert candidate.what == f"amends maintainer {other} comes; threshold 1 to 2"
    assert candidate.decision == "approved"
    assert candidate.silent == both
    shown = CliRunner().invoke(app, ["round", "show", "--home", str(lineage.home.path)]).stdout
    assert version[:10] in shown
    assert "needs        2 of these as well" in shown
    assert all(f"             {peer}" in shown for peer in both)
    assert "\nto decide    until " in shown
    assert "\nthis home    approved" in shown
    lineage.heard[version] -= 700
    assert look(lineage).candidates[0].until < time.time()


def test_a_person_sees_what_there_is_to_decide(lineage: Lineage) -> None:
    contributor = Key.generate()
    version = adopt(lineage, [add_patch(lineage, contributor, 1)], verdict=False)
    scores = (DomainScore("prose", 1.0, 0.9, 0.8, 0.85), DomainScore("answer/exact", 0.5, 0.5, 0.25, None))
    lineage.notes.note_scores(version, scores)
    (candidate,) = look(lineage).candidates
    assert candidate.patches == ((lineage.candidates[version].patches[0], contributor.peer),)
    assert candidate.scores == scores
    shown = CliRunner().invoke(app, ["round", "show", "--home", str(lineage.home.path)]).stdout
    assert f"merges     {candidate.patches[0][0][:10]}  {contributor.peer}" in shown
    assert "prose" in shown
    assert "to decide    until " in shown


def test_a_word_that_comes_too_late_is_refused(lineage: Lineage) -> None:
    _, version = propose_amendment(lineage, amendment(lineage, threshold=1, maintainers=pair(lineage)))
    lineage.notes.decide(version, accept=False, reason="not yet")
    lineage.heard[version] -= lineage.manifest.schedule.verdict_seconds
    with pytest.raises(Rejected, match="is over"):
        decide(lineage, version, True, "")
    assert lineage.notes.decision(version) == (False, "not yet")


def test_who_has_accepted_something_is_told_that_nothing_else_can_be(lineage: Lineage) -> None:
    _, first = propose_amendment(lineage, amendment(lineage, maintainers=pair(lineage)))
    smaller = amendment(lineage, limits=dataclasses.replace(lineage.manifest.limits, max_patch_bytes=9))
    with pytest.raises(Rejected, match=f"accepted version {first[:10]}"):
        propose_amendment(lineage, smaller)
    assert set(lineage.candidates) == {first}
    lineage.heard[first] -= lineage.manifest.schedule.verdict_seconds  # its node never signed it
    _, second = propose_amendment(lineage, smaller)
    assert lineage.notes.decision(second) == (True, "")


def test_maintainers_are_named_once_and_removed_only_when_they_are_some(lineage: Lineage) -> None:
    me, other = lineage.home.key.peer, Key.generate().peer
    for words, says in (
        (["--add-maintainer", other, "--remove-maintainer", other], "to be added and removed"),
        (["--remove-maintainer", other], "is no maintainer"),
    ):
        result = CliRunner().invoke(app, ["model", "amend", *words, "--home", str(lineage.home.path)])
        assert isinstance(result.exception, UsageError)
        assert says in str(result.exception)
    assert lineage.manifest.maintainers == (me,)


@pytest.mark.parametrize(("words", "threshold", "warns"), [([], 2, False), (["--threshold", "1"], 1, True)])
def test_more_than_half_decide_unless_something_else_is_said(
    tmp_path: Path, words: list[str], threshold: int, warns: bool
) -> None:
    keys = [text for _ in range(3) for text in ("--maintainer", Key.generate().peer)]
    command = ["model", "create", "starter", "--name", "mine", *keys, *words, "--home", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"{threshold} of 3 maintainers adopt" in result.stdout
    assert ("not more than half" in result.stderr) == warns


def pair(lineage: Lineage) -> tuple[PeerId, ...]:
    """This home's key, and another."""
    return tuple(sorted((lineage.home.key.peer, PeerId(Key.generate().peer))))


def test_who_would_become_a_maintainer_signs_for_itself(lineage: Lineage, tmp_path: Path) -> None:
    guest = Home.open(tmp_path / "guest")
    both = tuple(sorted((lineage.home.key.peer, guest.key.peer)))
    stored, version = propose_amendment(lineage, amendment(lineage, maintainers=both))
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
    assert lineage.notes.decision(version) == (False, "not now")


def test_what_cannot_be_decided_is_refused(lineage: Lineage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already"):
        propose_amendment(lineage, lineage.manifest.amendment)
    with pytest.raises(NotFound, match="no candidate"):
        find_candidate(lineage, "0123456789")
    _, version = propose_amendment(
        lineage, amendment(lineage, limits=dataclasses.replace(lineage.manifest.limits, max_patch_bytes=9))
    )
    assert next_round(lineage) == 2
    with pytest.raises(InvalidInput, match="reason"):
        decide(lineage, version, False, "")
    stranger = Home.open(tmp_path / "stranger")
    theirs = Lineage.create(stranger, lineage.home.objects.load(lineage.model))
    with pytest.raises(Rejected, match="none of the maintainers"):
        propose_amendment(theirs, amendment(lineage, threshold=1))
    home = ["--home", str(lineage.home.path)]
    for command in (["round", "approve", version], ["model", "amend", "--threshold", "1"]):
        assert isinstance(CliRunner().invoke(app, [*command, *home]).exception, NotRunning)


def test_a_patch_without_weight_is_left_out(lineage: Lineage) -> None:
    patch = add_patch(lineage, Key.generate(), 1)
    result = CliRunner().invoke(app, ["round", "weigh", f"{patch}=0", "--home", str(lineage.home.path)])
    assert result.exit_code == 0, result.output
    assert lineage.notes.weight_of(patch) == 0
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)
    assert maintainer.propose(1, lineage.head, (patch,)) is None
