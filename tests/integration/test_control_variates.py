"""Two rounds with control variates, on the starter model: what a version carries, and what contributors do with it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from p2pmodel import starter
from p2pmodel.cli.training_plan import assignment_of
from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.version import VersionNumber
from p2pmodel.node.lineages.intake import needed_blobs, store, take_in
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_change, round_mean
from p2pmodel.node.patches.contributing import Assignment, train_patch
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.store.home import Home
from p2pmodel.tensors import control
from p2pmodel.wire import canonical
from tests.support.lineages import begin

TEXT = (starter.DOMAINS / "xml.txt").read_text()[:3000]
OPTIONS = {"steps": 6, "batch": 4, "sequence": 64, "fisher_examples": 2, "learning_rate": 0.02, "checkpoint_every": 6}


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Lineage, Lineage]:
    """The maintainer's, and a contributor's with all of its records."""
    exam = tmp_path / "exam"
    exam.mkdir()
    # What they are examined on is what they learn from, so that every patch helps.
    rows = "".join(json.dumps({"text": TEXT[at : at + 500]}) + "\n" for at in range(0, len(TEXT), 500))
    for split in ("tune", "test"):
        (exam / f"xml.{split}.jsonl").write_text(rows)
    (exam / "exam.toml").write_text('[[domain]]\nname = "xml"\ntune = "xml.tune.jsonl"\ntest = "xml.test.jsonl"\n')
    mine = begin(tmp_path / "maintainer", exam)
    other = Home.open(tmp_path / "contributor")
    for ref in (mine.model, mine.manifest.exam.digest):
        other.objects.put(mine.home.objects.load(ref))
    return mine, Lineage.create(other, mine.home.objects.load(mine.model))


def give(lineage: Lineage, source: Lineage) -> None:
    """All records that the other knows."""
    for kind, ref in sorted(source.inventory(), key=lambda item: ("patch", "candidate", "verdict").index(item[0])):
        record = source.home.objects.load(ref.digest)
        refs = needed_blobs(lineage, kind, record)
        for blob in refs:
            lineage.home.objects.put(source.home.objects.load(blob.digest))
        store(lineage, kind, record, refs)
        lineage.refresh()


def contribute(lineage: Lineage, output: Path, **more: object) -> Assignment:
    text = output.with_suffix(".txt")
    text.write_text(TEXT)
    assignment = assignment_of(lineage, starter.MODEL, {"data": [text], **OPTIONS, **more})
    train_patch(assignment, output, lambda step: None)
    take_in(lineage, output.read_bytes())
    lineage.refresh()
    return assignment


def adopt(lineage: Lineage, round: int) -> None:
    maintainer = Maintainer(lineage, lineage.home.key.peer, starter.MODEL, lambda seconds: None)
    patches = tuple(sorted(p for p, header in lineage.patches.items() if header.parent == lineage.head))
    proposal = maintainer.propose(round, lineage.head, patches)
    assert proposal is not None
    for raw in proposal.blobs:
        lineage.home.objects.put(raw)
    _sign(lineage, "candidate", proposal.candidate)
    verdict = maintainer.examine(canonical.digest(canonical.encode(proposal.candidate)))
    assert verdict.accept, verdict.reason
    _sign(lineage, "verdict", verdict)


def _sign(lineage: Lineage, kind: str, noun: object) -> None:
    record = lineage.home.key.sign(kind, noun)
    store(lineage, kind, record, needed_blobs(lineage, kind, record))
    lineage.refresh()


@pytest.mark.timeout(300)
def test_two_rounds(homes: tuple[Lineage, Lineage], tmp_path: Path) -> None:
    mine, other = homes
    first = [contribute(x, tmp_path / f"{n}.p2patch", control=True, seed=n) for n, x in enumerate(homes)]
    assert all(assignment.mean is None for assignment in first)
    give(mine, other)
    adopt(mine, 1)
    give(other, mine)
    assert str(other.number(other.head)) == str(VersionNumber(1, 0, 1))

    mean = round_mean(other, other.head, "ia3@1")
    assert mean is not None
    own = []
    for merged in mine.version(mine.head).candidate.patches:
        patch = mine.patches[merged]
        assert patch.control is not None
        load = mine.home.objects.load
        places = control.places(load(patch.adapter.digest), patch_change(mine, patch), 1 << 20)
        own.append(control.read(load(patch.control.digest), places, 1 << 20))
    for slot, value in mean.items():
        expected = torch.stack([variate[slot] for variate in own]).mean(0)
        assert float((value - expected).norm()) <= 0.01 * float(expected.norm())

    # Who took part corrects its gradients, a newcomer has nothing to correct yet; both give theirs without being told.
    newcomer = Home.open(tmp_path / "newcomer")
    for raw in (mine.model, mine.manifest.exam.digest):
        newcomer.objects.put(mine.home.objects.load(raw))
    joined = Lineage.create(newcomer, mine.home.objects.load(mine.model))
    give(joined, mine)
    for name, lineage in (("known", other), ("new", joined)):
        assignment = contribute(lineage, tmp_path / f"{name}.p2patch", seed=7)
        assert assignment.mean is not None
        assert assignment.options.control
        patch = next(p for p in lineage.patches.values() if p.parent == lineage.head)
        assert patch.control is not None
        assert patch.provenance.recipe.continued == (name == "known")
        assert (patch.provenance.correction is not None) == (name == "known")
    without = assignment_of(other, starter.MODEL, {"data": [tmp_path / "new.txt"], "control": False})
    assert without.mean is None
    assert not without.options.control
    give(mine, other)
    give(mine, joined)
    adopt(mine, 2)
    assert str(mine.number(mine.head)) == "1.0.2"
    version = mine.version(mine.head)
    assert version.candidate.control is not None
    assert version.candidate.control != mine.versions[0].candidate.control


def test_a_mean_that_is_not_the_patches_is_refused(homes: tuple[Lineage, Lineage], tmp_path: Path) -> None:
    mine, _ = homes
    contribute(mine, tmp_path / "a.p2patch", control=True)
    maintainer = Maintainer(mine, mine.home.key.peer, starter.MODEL, lambda seconds: None)
    proposal = maintainer.propose(1, mine.head, tuple(mine.patches))
    assert proposal is not None
    for raw in proposal.blobs:
        mine.home.objects.put(raw)
    for false in (None, next(iter(mine.patches.values())).fisher):
        record = mine.home.key.sign("candidate", dataclasses.replace(proposal.candidate, control=false))
        if false is not None:
            with pytest.raises(Rejected):
                store(mine, "candidate", record, needed_blobs(mine, "candidate", record))
            for raw in proposal.blobs:
                mine.home.objects.put(raw)
            continue
        store(mine, "candidate", record, needed_blobs(mine, "candidate", record))
        mine.refresh()
        (version,) = mine.candidates
        verdict = maintainer.examine(version)
        assert not verdict.accept
        assert "control variates" in verdict.reason
