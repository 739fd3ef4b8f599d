"""Trainings that are done again, honest ones and others."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.patch import Patch
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.evidence import in_folder
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.patches import continuity
from p2pmodel.node.patches.auditing import MISSING, NEAR, OTHER, SAME, Audit, audit
from p2pmodel.node.patches.contributing import FOUR_BITS, Assignment, rounded, train_patch
from p2pmodel.node.patches.patchbook import OpenedPatch, open_patch
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob
from p2pmodel.wire import canonical
from tests.training_support import PROSE, byte_tokenizer, small_model

OPTIONS = TrainingOptions(
    steps=12, batch=2, sequence=32, learning_rate=0.05, weight_decay=0.1, fisher_examples=4, checkpoint_every=3
)


@dataclasses.dataclass(frozen=True)
class Training:
    lineage: Lineage
    base: Path
    data: Path
    opened: OpenedPatch

    def find(self, digest: Digest) -> bytes | None:
        objects = self.lineage.home.objects
        return objects.load(digest) if objects.has(digest) else None

    def audit(self, opened: OpenedPatch | None = None, segments: int = 4, **more: object) -> Audit:
        find = more.pop("find", self.find)
        files = more.pop("files", (self.data,))
        return audit(opened or self.opened, self.base, files, find, segments=segments, seed=1)  # type: ignore[arg-type]

    def saying(self, change: Callable[[Patch], Patch]) -> OpenedPatch:
        """The same patch with another header."""
        return dataclasses.replace(self.opened, patch=change(self.opened.patch))


@pytest.fixture(scope="module", params=["ia3@1", "lora@1"])
def training(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Training:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("training")
    base, data = folder / "model", folder / "prose.txt"
    small_model().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    data.write_text(PROSE * 60)
    home = Home.open(folder / "home")
    lineage = found(home, base, Founding("tiny", (home.key.peer,), 1, starter.EXAM, kinds=("ia3@1", "lora@1")))
    assignment = Assignment(
        lineage,
        base,
        lineage.head,
        request.param,
        (data,),
        options=OPTIONS,
        licence="CC0-1.0",
        bits=4 if request.param in FOUR_BITS else 32,
    )
    train_patch(assignment, folder / "a.p2patch", lambda step: None)
    torch.set_num_threads(threads)
    return Training(lineage, base, data, open_patch(home.path, str(folder / "a.p2patch")))


def recipe(patch: Patch, **changes: object) -> Patch:
    new = dataclasses.replace(patch.provenance.recipe, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(patch, provenance=dataclasses.replace(patch.provenance, recipe=new))


def on_another_processor(patch: Patch) -> Patch:
    software = (("cpu", "another"), *(pair for pair in patch.provenance.software if pair[0] != "cpu"))
    return dataclasses.replace(patch, provenance=dataclasses.replace(patch.provenance, software=software))


def test_a_small_lie_is_no_other_rounding(training: Training) -> None:
    lied = training.saying(lambda patch: recipe(patch, learning_rate=0.0505))
    elsewhere = dataclasses.replace(lied, patch=on_another_processor(lied.patch))
    for opened in (lied, elsewhere):
        assert all(segment.verdict == OTHER for segment in training.audit(opened).segments)


def test_an_honest_training_is_the_same_to_the_bit(training: Training) -> None:
    report = training.audit()
    assert not report.problems
    assert [segment.verdict for segment in report.segments] == [SAME] * 4
    assert [(s.first_step, s.last_step) for s in report.segments] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert (report.steps, report.of_steps, report.fisher) == (12, 12, SAME)
    assert report.comparable
    two = training.audit(segments=2)
    assert (two.steps, len(two.segments), two.of) == (6, 2, 4)


def test_another_recipe_or_other_data_are_noticed(training: Training, tmp_path: Path) -> None:
    for change in ({"learning_rate": 0.04}, {"seed": 1}, {"batch": 1}, {"clip": 0.001}):
        report = training.audit(training.saying(lambda patch, change=change: recipe(patch, **change)))  # type: ignore[misc]
        assert any(segment.verdict == OTHER for segment in report.segments), change
        assert report.problems
    other = tmp_path / "prose.txt"
    other.write_text(PROSE * 59 + PROSE.upper())
    with pytest.raises(
        InvalidInput, match=r"prose\.txt, SHA-256 .* is not among the files given\. The file of that name"
    ):
        training.audit(files=(other,))
    ref = canonical.digest(other.read_bytes())

    def lied(patch: Patch) -> Patch:
        file = dataclasses.replace(patch.provenance.data[0], digest=ref)
        return dataclasses.replace(patch, provenance=dataclasses.replace(patch.provenance, data=(file,)))

    report = training.audit(training.saying(lied), files=(other,))
    assert any(segment.verdict == OTHER for segment in report.segments)


def test_a_segment_that_was_altered_is_noticed_where_it_is_replayed(training: Training) -> None:
    """What a contributor that lies about steps 3 to 6 would name: a state that nothing leads to."""
    provenance = training.opened.patch.provenance
    raw = training.find(provenance.states[2])
    assert raw is not None
    tensors = blob.unpack(raw, None, len(raw))
    name = next(name for name in tensors if name.startswith("first/"))
    forged = blob.pack({**tensors, name: tensors[name] + 0.5})
    states = (*provenance.states[:2], canonical.digest(forged), *provenance.states[3:])
    opened = training.saying(
        lambda patch: dataclasses.replace(patch, provenance=dataclasses.replace(provenance, states=states))
    )
    report = training.audit(opened, find=lambda d: forged if d == states[2] else training.find(d))
    verdicts = [segment.verdict for segment in report.segments]
    assert verdicts[1:3] == [OTHER, OTHER]
    assert verdicts[0] == verdicts[3] == SAME


def test_an_adapter_that_its_checkpoint_does_not_round_to_is_noticed(training: Training) -> None:
    patch = training.opened.patch
    if patch.kind not in FOUR_BITS:
        assert patch.provenance.chosen is None
        return
    raw = training.find(patch.checkpoint)
    assert raw is not None
    values = blob.unpack(raw, None, len(raw))
    state = version_state(training.lineage, patch.parent)
    assert canonical.digest(rounded(patch.kind, values, state)) == patch.adapter.digest
    forged = rounded(patch.kind, {name: 2 * value - state[name] for name, value in values.items()}, state)
    ref = dataclasses.replace(patch.adapter, digest=canonical.digest(forged), size=len(forged))
    opened = dataclasses.replace(training.opened, patch=dataclasses.replace(patch, adapter=ref), adapter=forged)
    assert any("not its checkpoint" in problem for problem in training.audit(opened).problems)
    lost = training.audit(find=lambda digest: None if digest == patch.checkpoint else training.find(digest))
    assert any("not to be had" in gap for gap in lost.gaps)


def test_other_rounding_is_close(training: Training, tmp_path: Path) -> None:
    """As on another processor: every state a little off, and digests to fit."""
    provenance = training.opened.patch.provenance
    chance, blobs = torch.Generator().manual_seed(0), {}

    def nudged(digest: Digest) -> Digest:
        raw = training.find(digest)
        assert raw is not None
        tensors = blob.unpack(raw, None, len(raw))
        moved = {
            name: t * (1 + 1e-6 * torch.randn(t.shape, generator=chance)) if t.dtype == torch.float32 else t
            for name, t in tensors.items()
        }
        raw = blob.pack(moved)
        blobs[canonical.digest(raw)] = raw
        return canonical.digest(raw)

    states = (*provenance.states[:2], nudged(provenance.states[2]), *provenance.states[3:])
    checkpoints = list(provenance.checkpoints)
    raw = blobs[states[2]]
    adapter = {n.removeprefix("parameter/"): t for n, t in blob.unpack(raw, None, len(raw)).items() if n[:2] == "pa"}
    scale = training.find(checkpoints[2])
    assert scale is not None
    held = dict(blob.unpack(scale, None, len(scale))) | adapter
    blobs[canonical.digest(blob.pack(held))] = blob.pack(held)
    checkpoints[2] = canonical.digest(blob.pack(held))
    changed = dataclasses.replace(provenance, states=states, checkpoints=tuple(checkpoints))
    opened = training.saying(lambda patch: dataclasses.replace(patch, provenance=changed))
    report = training.audit(opened, find=lambda d: blobs.get(d) or training.find(d))
    assert [segment.verdict for segment in report.segments] == [SAME, OTHER, OTHER, SAME]
    elsewhere = dataclasses.replace(opened, patch=on_another_processor(opened.patch))
    report = training.audit(elsewhere, find=lambda d: blobs.get(d) or training.find(d))
    assert [segment.verdict for segment in report.segments] == [SAME, NEAR, NEAR, SAME]
    assert not report.comparable
    for digest in (*provenance.checkpoints, *provenance.states):
        found = training.find(digest)
        assert found is not None
        (tmp_path / f"{digest}.safetensors").write_bytes(found)
    assert not training.audit(find=in_folder(tmp_path)).problems


def test_a_corrected_training_is_audited_with_its_correction(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if training.opened.patch.kind != "ia3@1":
        pytest.skip("LoRA has no control variates")
    lineage, state = training.lineage, version_state(training.lineage, training.lineage.head)
    generator = torch.Generator().manual_seed(0)
    mean = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in state.items() if name[:3] == "ia3"}
    files, threads = (training.data,), torch.get_num_threads()
    torch.set_num_threads(1)
    own = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in mean.items()}
    moments = training.find(training.opened.patch.provenance.states[-1])
    assert moments is not None
    past = continuity.Inheritance(canonical.digest(b"past"), moments, own, None)
    monkeypatch.setattr(continuity, "inherited", lambda *of: past)
    assignment = Assignment(lineage, training.base, lineage.head, "ia3@1", files, options=OPTIONS, mean=mean)
    train_patch(assignment, tmp_path / "b.p2patch", lambda step: None)
    torch.set_num_threads(threads)
    opened = open_patch(lineage.home.path, str(tmp_path / "b.p2patch"))
    correction = blob.pack({name: mean[name] - own[name] for name in mean})

    def corrected(digest: Digest | None) -> OpenedPatch:
        provenance = dataclasses.replace(opened.patch.provenance, correction=digest)
        return dataclasses.replace(opened, patch=dataclasses.replace(opened.patch, provenance=provenance))

    digest = canonical.digest(correction)
    report = training.audit(corrected(digest), find=lambda d: correction if d == digest else training.find(d))
    assert [segment.verdict for segment in report.segments] == [SAME] * 4
    assert training.audit(corrected(None)).problems
    assert len(training.audit(corrected(canonical.digest(b"gone"))).gaps) == 4


def test_states_that_are_gone_and_patches_without_any_are_said(training: Training) -> None:
    report = training.audit(find=lambda digest: None)
    assert {segment.verdict for segment in report.segments} == {MISSING}
    assert len(report.gaps) == 4 + (training.opened.patch.kind in FOUR_BITS)
    assert not report.problems
    none = dataclasses.replace(training.opened.patch.provenance, states=(), checkpoints=())
    opened = training.saying(lambda patch: dataclasses.replace(patch, provenance=none))
    with pytest.raises(NotFound, match="names no states"):
        training.audit(opened)
    assert json.dumps(dataclasses.asdict(report))
