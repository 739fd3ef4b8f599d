"""Trainings that are done again, honest ones and others."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, NotFound, P2PModelError
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.patch import MAX_COUNT, MAX_STEPS, Patch
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.patches import continuity
from p2pmodel.node.patches.auditing import MISSING, NEAR, OTHER, SAME, Audit, audit
from p2pmodel.node.patches.contributing import Assignment, rounded, train_patch
from p2pmodel.node.patches.evidence import in_folder
from p2pmodel.node.patches.patchbook import OpenedPatch, open_patch
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob
from p2pmodel.wire import canonical
from tests.support.training import PROSE, byte_tokenizer, small_model

OPTIONS = TrainingOptions(
    steps=12, batch=2, sequence=32, learning_rate=0.05, weight_decay=0.1, fisher_examples=4, checkpoint_every=3
)

FOUR_BITS = ("ia3@1", "dense@1")


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


def test_a_recipe_that_no_training_can_have_had_is_refused_in_a_sentence(training: Training) -> None:
    for change, sentence in (
        ({"kind_options": (("expert", 1.0),)}, "'expert' that is not known"),
        ({"kind_options": (("rank", 2.5),)}, "rank = 2.5"),
        ({"kind_options": (("mask_examples", 1e300),)}, "mask_examples = 1e"),
        ({"sequence": MAX_COUNT}, "the model reads"),
        ({"batch": MAX_COUNT, "accumulate": MAX_COUNT}, "more than this machine has"),
        ({"validation": 0.0}, "held out"),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            training.audit(training.saying(lambda patch, change=change: recipe(patch, **change)))  # type: ignore[misc]


def test_a_state_or_a_correction_of_something_else_differs(training: Training) -> None:
    """They are what the patch names, byte for byte, and no training can have had them."""
    provenance = training.opened.patch.provenance
    raw = training.find(provenance.states[0])
    assert raw is not None
    honest = blob.unpack(raw, None, len(raw))
    name, leaf = next((n.removeprefix("parameter/"), t) for n, t in honest.items() if n.startswith("parameter/"))
    for forged in (
        blob.pack({"unknown": leaf}),
        blob.pack({name: torch.zeros(1, *leaf.shape)}),
        blob.pack({name: torch.zeros(1)}),
        b"no blob at all",
    ):
        digest = canonical.digest(forged)
        noun = dataclasses.replace(provenance, correction=digest)
        opened = training.saying(lambda patch, noun=noun: dataclasses.replace(patch, provenance=noun))  # type: ignore[misc]
        report = training.audit(opened, find=lambda d, forged=forged: {digest: forged}.get(d) or training.find(d))  # type: ignore[misc]  # noqa: B023
        assert [segment.verdict for segment in report.segments] == [OTHER] * 4
        assert report.problems
    for changes in (
        {"steps": torch.full_like(honest["steps"], -1)},
        {"steps": honest["steps"].float()},
        {f"parameter/{name}": leaf.double()},
        {f"second/{name}": torch.full_like(leaf, -1.0), "steps": torch.full_like(honest["steps"], 3)},
        {f"parameter/{name}": torch.full_like(leaf, 3e38)},
    ):
        forged = blob.pack({**honest, **changes})
        states = (canonical.digest(forged), *provenance.states[1:])
        noun = dataclasses.replace(provenance, states=states)
        opened = training.saying(lambda patch, noun=noun: dataclasses.replace(patch, provenance=noun))  # type: ignore[misc]
        report = training.audit(opened, find=lambda d: forged if d == states[0] else training.find(d))  # noqa: B023
        assert report.segments[0].verdict == OTHER


def test_states_after_the_last_step_hide_nothing(training: Training) -> None:
    """Each of them follows from the one before in no steps, whatever the rest is."""
    provenance = training.opened.patch.provenance
    padded = dataclasses.replace(
        provenance,
        states=provenance.states + provenance.states[-1:] * 100,
        checkpoints=provenance.checkpoints + provenance.checkpoints[-1:] * 100,
    )
    report = training.audit(training.saying(lambda patch: dataclasses.replace(patch, provenance=padded)), segments=1)
    assert any("no steps for so many" in problem for problem in report.problems)


NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-2, 2), st.sampled_from((8.0, 16.0, 1e-300, 1e300))
)
NAMES = st.sampled_from(("density", "mask_examples", "rank", "alpha", "router", "expert", "", "data"))
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, (1 << 63) - 1),
        "steps": st.integers(0, MAX_STEPS),
        **{name: st.integers(1, 4) for name in ("batch", "accumulate", "fisher_examples", "held_out_blocks")},
        "sequence": st.sampled_from((1, 2, 32, 100, MAX_COUNT)),
        **{name: st.floats(0, 1e300) for name in ("learning_rate", "weight_decay", "clip")},
        **{name: st.floats(0, 1) for name in ("warm_up", "validation")},
        **{name: st.booleans() for name in ("packing", "control", "continued")},
        **{name: st.text(max_size=32) for name in ("optimizer", "schedule", "precision")},
        "fisher": st.sampled_from(("model", "data", "adam", "flat")),
        "kind_options": st.dictionaries(NAMES, NUMBERS, max_size=3).map(lambda given: tuple(sorted(given.items()))),
    },
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_patch_says_an_audit_ends_in_a_report_or_in_a_sentence(
    training: Training, data: st.DataObject
) -> None:
    provenance = training.opened.patch.provenance
    raw = training.find(provenance.states[0])
    assert raw is not None
    honest = blob.unpack(raw, None, len(raw))
    values = st.sampled_from((0.0, 1.0, -1.0, 3e38, 1e-40)).map(float)
    shapes = st.sampled_from(
        [t.shape for t in honest.values()] + [torch.Size(()), torch.Size((0,)), torch.Size((2, 3))]
    )
    dtypes = st.sampled_from((torch.float32, torch.int64, torch.uint8, torch.bfloat16))
    tensors = st.builds(lambda shape, value, dtype: torch.full(shape, value).to(dtype), shapes, values, dtypes)
    names = st.sampled_from([*honest, "scale", *(name.partition("/")[2] for name in honest)])
    forged = st.builds(
        lambda kept, new: blob.pack({**(honest if kept else {}), **new}),
        st.booleans(),
        st.dictionaries(names, tensors, max_size=2),
    ) | st.binary(max_size=16)
    known, blobs = [*provenance.states, *provenance.checkpoints], {}

    def digests(like: tuple[Digest, ...]) -> tuple[Digest, ...]:
        found = list(like)
        for _ in range(data.draw(st.integers(0, 2))):
            new = data.draw(forged)
            blobs[canonical.digest(new)] = new
            at = data.draw(st.integers(0, len(found) - 1))
            found[at] = data.draw(st.sampled_from([canonical.digest(new), *known]))
        return tuple(found)

    changes = data.draw(st.sampled_from(({}, {"threads": 1}))) | {
        "states": digests(provenance.states),
        "checkpoints": digests(provenance.checkpoints),
        "checkpoint_every": data.draw(st.sampled_from((provenance.checkpoint_every, 1, 5))),
        "correction": data.draw(st.sampled_from((None, *digests(provenance.states[:1])))),
        "chosen": data.draw(st.sampled_from((None, provenance.chosen, *digests(provenance.checkpoints[:1])))),
        "software": data.draw(st.sampled_from((provenance.software, (("", "1"),), (("cpu", "\0"), ("\0", "/"))))),
    }
    try:
        noun = dataclasses.replace(provenance, **changes)  # type: ignore[arg-type]
        patch = dataclasses.replace(training.opened.patch, provenance=noun)
        patch = recipe(patch, **data.draw(RECIPES)) if data.draw(st.booleans()) else patch
    except ValueError:  # no such noun is ever decoded
        assume(False)
    opened = dataclasses.replace(training.opened, patch=patch)
    with contextlib.suppress(P2PModelError):
        assert training.audit(opened, segments=1, find=lambda d: blobs.get(d) or training.find(d)).segments
