"""What a proposer makes of a round's patches, on the starter model and a small exam."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pmodel import starter
from p2pmodel.domain.errors import NotFound, NotRunning, Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.model import MergeSpec
from p2pmodel.domain.version import LeftOut
from p2pmodel.engine.exams import Suite
from p2pmodel.engine.exams.screening import Screened
from p2pmodel.logic.judgement import NO_NUMBER
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.merging import merge, stored
from p2pmodel.node.lineages.states import patch_state, version_state
from p2pmodel.node.rounds import asides, maintaining
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.tensors import blob
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.lineages import accept, add_patch, add_patch_of, adopt, begin


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """Its head is worse than its base, so that a way back is a gain. The exam has enough texts to decide early."""
    return worsened(tmp_path, 4)


@pytest.fixture
def small(tmp_path: Path) -> Lineage:
    """The same with few texts."""
    return worsened(tmp_path, 1, every=4)


def worsened(folder: Path, parts: int, every: int = 1) -> Lineage:
    exam = folder / "exam"
    exam.mkdir()
    texts = [text for domain in Suite.load(starter.EXAM).domains for text in domain.test][::every]
    rows = [text[60 * at : 60 * (at + 1)] for text in texts for at in range(parts)]
    (exam / "python.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (exam / "safe.jsonl").write_text(json.dumps({"prompt": "import ", "must_not": ["no such thing"]}) + "\n")
    index = '[[{}]]\nname = "{}"\ntune = "{}.jsonl"\ntest = "{}.jsonl"\n'
    tables = [index.format(kind, name, name, name) for kind, name in (("domain", "python"), ("regression", "safe"))]
    (exam / "exam.toml").write_text('name = "small"\n' + "".join(tables) + "tokens = 4\n")
    lineage = begin(folder / "home", exam)
    adopt(lineage, [add_patch(lineage, Key.generate(), 1, size=0.5)])
    return lineage


def test_patches_are_examined_one_by_one_and_clear_ones_on_few_cases(
    lineage: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    base = version_state(lineage, lineage.model)
    good = add_patch_of(lineage, Key.generate(), base)
    ruined = add_patch(lineage, Key.generate(), 2, size=5.0)
    useless = add_patch(lineage, Key.generate(), 3, size=0.0)
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)
    with caplog.at_level(logging.INFO, logger="p2pmodel.node.rounds"):
        proposal = maintainer.propose(2, lineage.head, tuple(sorted((good, ruined, useless))))
    assert proposal is not None
    assert proposal.candidate.patches == (good,)
    reasons = {entry.patch: entry.reason for entry in proposal.candidate.left_out}
    assert reasons[ruined] == "it makes python worse by more than 10.0%"
    assert "improves no" in reasons[useless]
    said = {line.split()[1]: line for line in caplog.messages if line.startswith("patch ")}
    assert "145 of 145 cases" in said[useless[:10]]
    for patch in (good, ruined):
        cases = int(said[patch[:10]].partition("(")[2].split()[0])
        assert cases < 100


def test_a_copy_is_left_out_and_nobody_accepts_a_candidate_with_it(small: Lineage) -> None:
    base = version_state(small, small.model)
    good = add_patch_of(small, Key.generate(), base)
    head = version_state(small, small.head)
    copy = add_patch_of(
        small, Key.generate(), {name: value + 0.5 * (base[name] - value) for name, value in head.items()}
    )
    refused: list[str] = []
    maintainer = Maintainer(small, small.home.key.peer, starter.MODEL, lambda seconds: None, refused.append)
    proposal = maintainer.propose(2, small.head, tuple(sorted((good, copy))))
    assert proposal is not None
    assert proposal.candidate.patches == (good,)
    assert proposal.candidate.left_out == (LeftOut(copy, f"it is a copy of patch {good[:10]}"),)
    version = VersionId(canonical.digest(b"with both"))
    small.candidates[version] = replace(proposal.candidate, patches=tuple(sorted((good, copy))), left_out=())
    verdict = maintainer.examine(version)
    assert not verdict.accept
    assert "one is a copy" in verdict.reason
    assert refused == ["copies"]


def test_who_cannot_merge_as_the_manifest_says_is_no_maintainer(lineage: Lineage) -> None:
    for spec, error in ((MergeSpec("magic@1"), NotFound), (MergeSpec("mean@1", (("magic", 1.0),)), Rejected)):
        lineage.manifest = replace(lineage.manifest, merge=spec)
        with pytest.raises(error, match="magic"):
            Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)


def test_a_merge_gains_what_its_patch_gains(small: Lineage) -> None:
    good = add_patch_of(small, Key.generate(), version_state(small, small.model))
    maintainer = Maintainer(small, small.home.key.peer, starter.MODEL, lambda seconds: None)
    proposal = maintainer.propose(2, small.head, (good,))
    assert proposal is not None
    assert 0.5 < proposal.candidate.alpha < 1.5


def moved(lineage: Lineage, by: float) -> dict[str, Tensor]:
    """The head's values, that much of the way to its base, which is better."""
    base, head = version_state(lineage, lineage.model), version_state(lineage, lineage.head)
    return {name: value + by * (base[name] - value) for name, value in head.items()}


def without_numbers(lineage: Lineage) -> dict[str, Tensor]:
    """Finite values of a patch, with which the model's losses are not."""
    return {
        name: torch.full_like(value, 3e38) if name.startswith("ia3:out:") else value
        for name, value in version_state(lineage, lineage.head).items()
    }


def test_a_patch_that_cannot_be_merged_stops_neither_the_others_nor_the_proposer(
    small: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as lenient:  # as a program that checked less let them in
        lenient.setattr(intake, "check_tensors", lambda *_: None)
        values = moved(small, 0.9)
        lost = add_patch_of(small, Key.generate(), without_numbers(small))
        false = add_patch_of(small, Key.generate(), values, {name: -torch.ones_like(v) for name, v in values.items()})
    good = add_patch_of(small, Key.generate(), moved(small, 1.0))
    maintainer = Maintainer(small, small.home.key.peer, starter.MODEL, lambda seconds: None)
    proposal = maintainer.propose(2, small.head, tuple(sorted((good, lost, false))))
    assert proposal is not None
    assert proposal.candidate.patches == (good,)
    reasons = {entry.patch: entry.reason for entry in proposal.candidate.left_out}
    assert reasons == {lost: NO_NUMBER, false: "The patch's Fisher has negative values."}
    version = VersionId(canonical.digest(canonical.encode(proposal.candidate)))
    small.candidates[version] = proposal.candidate
    verdict = maintainer.examine(version)
    assert verdict.accept, verdict.reason
    assert all(score.mean is not None for score in verdict.scores)
    assert maintainer.propose(2, small.head, (lost,)) is None


def test_a_copy_that_harms_does_not_drive_out_its_original(small: Lineage, caplog: pytest.LogCaptureFixture) -> None:
    scaled = add_patch_of(small, Key.generate(), moved(small, 50.0))
    again = add_patch_of(small, Key.generate(), moved(small, 50.0))
    good = add_patch_of(small, Key.generate(), moved(small, 1.0))
    copy = add_patch_of(small, Key.generate(), moved(small, 0.9))
    maintainer = Maintainer(small, small.home.key.peer, starter.MODEL, lambda seconds: None)
    with caplog.at_level(logging.INFO, logger="p2pmodel.node.rounds"):
        proposal = maintainer.propose(2, small.head, tuple(sorted((scaled, again, good, copy))))
    assert proposal is not None
    assert proposal.candidate.patches == (good,)
    reasons = {entry.patch: entry.reason for entry in proposal.candidate.left_out}
    assert reasons[copy] == f"it is a copy of patch {good[:10]}"
    assert reasons[scaled] == reasons[again]
    assert reasons[scaled].startswith("it makes ") or reasons[scaled] == NO_NUMBER
    examined = [line.split()[1] for line in caplog.messages if " cases in " in line]
    assert examined == [scaled[:10], good[:10]]


def test_a_plain_mean_without_scores_says_nothing_against_a_candidate(small: Lineage) -> None:
    """Three patches, so that a median stands for the honest ones. The Fisher of what ruins the plain mean is zero."""
    chance = torch.Generator().manual_seed(7)
    good = moved(small, 1.0)
    other = {name: value + 0.05 * torch.randn(value.shape, generator=chance) for name, value in good.items()}
    nothing = {name: torch.zeros_like(value) for name, value in good.items()}
    patches = [add_patch_of(small, Key.generate(), values) for values in (good, other)]
    patches = sorted((*patches, add_patch_of(small, Key.generate(), without_numbers(small), nothing)))
    sources = [stored(small, patch) for patch in patches]
    result = blob.pack(
        merge(small, small.head, version_state(small, small.head), sources, small.manifest.merge).at(1.0)
    )
    before = small.versions[-1].candidate
    version = VersionId(canonical.digest(b"of all three"))
    small.candidates[version] = replace(
        before,
        parent=small.head,
        number=before.number.next_patch(),
        patches=tuple(patches),
        result=canonical.blob_ref(result),
    )
    verdict = Maintainer(small, small.home.key.peer, starter.MODEL, lambda seconds: None).examine(version)
    assert verdict.accept, verdict.reason
    assert verdict.scores
    assert all(score.mean is None for score in verdict.scores)


def test_work_that_nobody_wants_any_more_ends_before_the_next_patch(
    small: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    patches = [add_patch(small, Key.generate(), seed, size=5.0) for seed in (2, 3)]
    maintainer = Maintainer(small, small.home.key.peer, starter.MODEL, lambda seconds: None)
    with (
        caplog.at_level(logging.INFO, logger="p2pmodel.node.rounds"),
        pytest.raises(NotRunning, match="not wanted any more"),
    ):
        maintainer.propose(2, small.head, tuple(sorted(patches)), lambda: not caplog.messages)
    assert len(caplog.messages) == 1


def test_nobody_but_the_proposer_knows_on_which_cases_a_patch_is_tried_first(
    small: Lineage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[str] = []

    def noting(*arguments: Any) -> Screened:
        seeds.append(arguments[-1])
        return Screened("it is not wanted here", 1, 1)

    monkeypatch.setattr(maintaining, "screen", noting)
    patch = add_patch(small, Key.generate(), 2)
    for key, rounds in ((small.home.key, (2, 2, 3)), (Key.generate(), (2,))):
        monkeypatch.setattr(small.home, "key", key)
        maintainer = Maintainer(small, key.peer, starter.MODEL, lambda seconds: None)
        for round in rounds:
            assert maintainer.propose(round, small.head, (patch,)) is None
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


def test_momentum_goes_on_from_the_steps_of_the_versions_before(tmp_path: Path) -> None:
    """Through an amendment, which moves nothing, and with nothing kept of it."""
    lineage = begin(tmp_path / "home", merge=MergeSpec("task-arithmetic@1", (("momentum", 0.5), ("norm_clip", 100.0))))
    velocity: dict[str, Tensor] = {}
    for number, alpha in enumerate((0.5, 1.0, 0.7)):
        before = version_state(lineage, lineage.head)
        count = number + 1
        patches = sorted(add_patch(lineage, Key.generate(), 10 * number + seed) for seed in range(count))
        sources = [stored(lineage, patch) for patch in patches]
        merged = merge(lineage, lineage.head, before, sources, lineage.manifest.merge)
        alone = [patch_state(lineage, lineage.patches[patch]) for patch in patches]
        for name, value in before.items():
            total = torch.stack([state[name].double() - value.double() for state in alone]).sum(0)
            old = velocity.get(name, torch.zeros_like(total))
            velocity[name] = 0.5 * old + total / count
            torch.testing.assert_close(merged.update[name], total + 0.5 * count * velocity[name], rtol=1e-4, atol=1e-5)
        adopt(lineage, patches, state=merged.at(alpha / count), alpha=alpha / count)
        limits = replace(lineage.manifest.limits, regression_tolerance=0.1 + 0.01 * number)
        _, amended = asides.propose_amendment(lineage, replace(lineage.manifest.amendment, limits=limits))
        accept(lineage, lineage.candidates[amended])


def test_a_candidate_without_the_momentum_is_refused(tmp_path: Path) -> None:
    lineage = begin(tmp_path / "home", merge=MergeSpec("mean@1", (("momentum", 0.5),)))
    adopt(lineage, [add_patch(lineage, Key.generate(), 1)])
    patch = add_patch(lineage, Key.generate(), 2)
    before, plain = version_state(lineage, lineage.head), MergeSpec("mean@1")
    without = merge(lineage, lineage.head, before, [stored(lineage, patch)], plain).at(1.0)
    version = adopt(lineage, [patch], state=without)
    verdict = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None).examine(version)
    assert not verdict.accept
    assert verdict.reason == "Recomputing the merge gives another result than the candidate's."
