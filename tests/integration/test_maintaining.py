"""What a proposer makes of a round's patches, on the starter model and a small exam."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from p2pmodel import starter
from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.model import MergeSpec
from p2pmodel.domain.version import LeftOut
from p2pmodel.engine.exams import Suite
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.lineages import add_patch, add_patch_of, adopt, begin


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """Its head is worse than its base, so that a way back is a gain. The exam has enough texts to decide early."""
    exam = tmp_path / "exam"
    exam.mkdir()
    texts = [text for domain in Suite.load(starter.EXAM).domains for text in domain.test]
    rows = [text[at : at + 60] for text in texts for at in range(0, 240, 60)]
    (exam / "python.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (exam / "safe.jsonl").write_text(json.dumps({"prompt": "import ", "must_not": ["no such thing"]}) + "\n")
    index = '[[{}]]\nname = "{}"\ntune = "{}.jsonl"\ntest = "{}.jsonl"\n'
    tables = [index.format(kind, name, name, name) for kind, name in (("domain", "python"), ("regression", "safe"))]
    (exam / "exam.toml").write_text('name = "small"\n' + "".join(tables) + "tokens = 4\n")
    lineage = begin(tmp_path / "home", exam)
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
    with caplog.at_level(logging.INFO, logger="p2pmodel.node.rounds.maintaining"):
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


def test_a_copy_is_left_out_and_nobody_accepts_a_candidate_with_it(lineage: Lineage) -> None:
    base = version_state(lineage, lineage.model)
    good = add_patch_of(lineage, Key.generate(), base)
    head = version_state(lineage, lineage.head)
    copy = add_patch_of(
        lineage, Key.generate(), {name: value + 0.5 * (base[name] - value) for name, value in head.items()}
    )
    refused: list[str] = []
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None, refused.append)
    proposal = maintainer.propose(2, lineage.head, tuple(sorted((good, copy))))
    assert proposal is not None
    assert proposal.candidate.patches == (good,)
    assert proposal.candidate.left_out == (LeftOut(copy, f"it is a copy of patch {good[:10]}"),)
    version = VersionId(canonical.digest(b"with both"))
    lineage.candidates[version] = replace(proposal.candidate, patches=tuple(sorted((good, copy))), left_out=())
    verdict = maintainer.examine(version)
    assert not verdict.accept
    assert "one is a copy" in verdict.reason
    assert refused == ["copies"]


def test_who_cannot_merge_as_the_manifest_says_is_no_maintainer(lineage: Lineage) -> None:
    for spec, error in ((MergeSpec("magic@1"), NotFound), (MergeSpec("mean@1", (("magic", 1.0),)), Rejected)):
        lineage.manifest = replace(lineage.manifest, merge=spec)
        with pytest.raises(error, match="magic"):
            Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)


def test_a_merge_gains_what_its_patch_gains(lineage: Lineage) -> None:
    good = add_patch_of(lineage, Key.generate(), version_state(lineage, lineage.model))
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)
    proposal = maintainer.propose(2, lineage.head, (good,))
    assert proposal is not None
    assert 0.5 < proposal.candidate.alpha < 1.5
