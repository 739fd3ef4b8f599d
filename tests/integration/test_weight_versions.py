"""Versions of the kinds that change weights: from training over the merge to stages that serve what came of it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.model import Limits, Schedule
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.evaluation import attached
from p2pmodel.engine.runner import InferenceSession, Runner
from p2pmodel.engine.stage import Stage, load_stage
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.engine.versions import MAX_FOLDED, VersionTable, stack_states, weights_key
from p2pmodel.node.hosting.keeping import adopt
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_file_state, patch_state, version_state
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.starter import MODEL as STARTER
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.patch_kind import KindOptions
from p2pmodel.wire import bundle, canonical
from p2pmodel.wire.signing import Key
from tests.support import factories
from tests.support.families import save_small
from tests.support.lineages import exam_of

KINDS = ("fish", "dense", "lora")
PROSE = "the quick brown fox jumps over the lazy dog and runs away. " * 3
CODEC = get_codec("fp32")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exam_of(tmp_path_factory.mktemp("exam"), PROSE)


def begin(home: Home, exam: Path, *kinds: str) -> Lineage:
    return found(
        home,
        STARTER,
        Founding(
            name="weights",
            maintainers=(home.key.peer,),
            threshold=1,
            exam=exam,
            schedule=Schedule(min_patches=1),
            limits=Limits(regression_tolerance=0.5),
            kinds=tuple(f"{kind}@1" for kind in kinds),
        ),
    )


def trained_patch(lineage: Lineage, key: Key, kind: str, seed: int) -> bytes:
    """A signed patch file of a few steps on the prose."""
    model = load_whole(STARTER).requires_grad_(False)
    ids = load_tokenizer(STARTER)(PROSE)["input_ids"]
    blocks = Blocks.of_ids(torch.tensor([ids[at : at + 33] for at in range(seed, seed + 4)]))
    trainee = new_trainee(model, kind, version_state(lineage, lineage.head), blocks, KindOptions(mask_examples=2), seed)

    def losses(part: slice) -> Tensor:
        logits = model(input_ids=blocks.ids[part, :-1], use_cache=False).logits
        nats: Tensor = torch.nn.functional.cross_entropy(logits.transpose(1, 2), blocks.labels[part], reduction="none")
        return nats.sum(1)

    optimiser = torch.optim.Adam(list(trainee.parameters.values()), lr=1e-3)
    for _ in range(3):
        with trainee.use():
            loss = losses(slice(0, 4)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
    raw = blob.pack(trainee.adapter()), blob.pack(compact.encode(trainee.squared_gradients(losses, 2)))
    adapter, fisher = (canonical.blob_ref(part) for part in raw)
    patch: Patch = dataclasses.replace(
        factories.patch(key, lineage.model, lineage.head), kind=kind, adapter=adapter, fisher=fisher
    )
    return bundle.pack(key.sign("patch", patch), *raw)


def adopt_round(lineage: Lineage, home: Home, number: int) -> VersionId:
    """Proposes, examines and adopts what waits for the round, as its only maintainer."""
    maintainer = Maintainer(lineage, home.key.peer, STARTER, lambda seconds: None)
    waiting = tuple(p for p, patch in lineage.patches.items() if patch.parent == lineage.head)
    proposal = maintainer.propose(number, lineage.head, waiting)
    assert proposal is not None
    for part in proposal.blobs:
        home.objects.put(part)
    record = home.key.sign("candidate", proposal.candidate)
    intake.store(lineage, "candidate", record, intake.needed_blobs(lineage, "candidate", record))
    lineage.refresh()
    version = next(v for v, candidate in lineage.candidates.items() if candidate == proposal.candidate)
    verdict = maintainer.examine(version)
    assert verdict.accept, verdict.reason
    record = home.key.sign("verdict", verdict)
    intake.store(lineage, "verdict", record, intake.needed_blobs(lineage, "verdict", record))
    lineage.refresh()
    assert lineage.head == version
    return version


@torch.inference_mode()
def through_stages(whole: PreTrainedModel, hosted: list[tuple[Stage, VersionTable]], version: VersionId) -> Tensor:
    """Logits of the prose, by the head of `whole` and the layers of stages."""
    ids = torch.tensor([list(PROSE.encode()[:20])]) % int(whole.config.vocab_size)
    hidden = whole.base_model.embed_tokens(ids)
    for stage, table in hosted:
        cache = stage.new_cache(stage.span, 32)
        hidden = stage.forward(hidden, cache, stage.span, vectors=table.get(version))
    logits: Tensor = whole.lm_head(whole.base_model.norm(hidden))
    return logits


@torch.inference_mode()
def locally(whole: PreTrainedModel, lineage: Lineage, version: VersionId) -> Tensor:
    ids = torch.tensor([list(PROSE.encode()[:20])]) % int(whole.config.vocab_size)
    state = version_state(lineage, version)
    with attached(whole, Kinds(lineage.manifest.kinds), state) as applier, applier.use(state):
        logits: Tensor = whole(input_ids=ids, use_cache=True).logits
    return logits


@pytest.mark.parametrize(
    ("kinds", "rounds"), [(("fish",), 1), (("dense",), 1), (("lora",), 1), (("ia3", "fish", "lora"), 2)]
)
def test_a_lineage_is_trained_merged_adopted_and_served(
    tmp_path: Path, exam: Path, kinds: tuple[str, ...], rounds: int
) -> None:
    home = Home.open(tmp_path / "home")
    lineage = begin(home, exam, *kinds)
    checkpoint, whole = read_checkpoint(STARTER), load_whole(STARTER)
    spans = (Span(0, 2), Span(2, checkpoint.layers))
    stages = [load_stage(checkpoint, span) for span in spans]
    hosted = [(stage, VersionTable(stage)) for stage in stages]
    for _, table in hosted:
        adopt(table, lineage, VersionId(lineage.model))
    plain = through_stages(whole, hosted, VersionId(lineage.model))
    assert torch.equal(plain, locally(whole, lineage, VersionId(lineage.model)))
    known = [VersionId(lineage.model)]
    for number in range(1, rounds + 1):
        for seed, kind in enumerate((kinds * 2)[: max(2, len(kinds))]):
            raw = trained_patch(lineage, Key.generate(), f"{kind}@1", seed)
            (tmp_path / "p").write_bytes(raw)
            alone = patch_file_state(lineage, tmp_path / "p")
            record = intake.take_in(lineage, raw)
            lineage.refresh()
            again = patch_state(lineage, lineage.patches[record.digest])
            assert blob.pack(alone) == blob.pack(again)
            intake.check_stored_patch(lineage, record.digest)
        version = adopt_round(lineage, home, number)
        known.append(version)
        for _, table in hosted:
            adopt(table, lineage, version)
        logits = through_stages(whole, hosted, version)
        assert torch.equal(logits, locally(whole, lineage, version))
        assert not torch.equal(logits, plain)
    for version in reversed(known):  # each still gives what it gave
        assert torch.equal(through_stages(whole, hosted, version), locally(whole, lineage, version))


def test_blobs_that_do_not_fit_are_not_taken_in(tmp_path: Path, exam: Path) -> None:
    home, key = Home.open(tmp_path / "home"), Key.generate()
    lineage = begin(home, exam, "fish")
    opened = bundle.open_bundle(trained_patch(lineage, key, "fish@1", 0))

    def refused(adapter: bytes, fisher: bytes, kind: str = "fish@1") -> str:
        refs = [canonical.blob_ref(raw) for raw in (adapter, fisher)]
        patch = dataclasses.replace(opened.patch, kind=kind, adapter=refs[0], fisher=refs[1])
        with pytest.raises(Rejected) as error:
            intake.take_in(lineage, bundle.pack(key.sign("patch", patch), adapter, fisher))
        assert not any(home.objects.has(ref.digest) for ref in refs)
        return error.value.reason

    adapter, fisher = opened.raw.adapter, opened.raw.fisher
    slot = lineage.manifest.slots[0]
    beyond = {slot.name + "#index": torch.tensor([2**31 - 1], dtype=torch.int32), slot.name + "#value": torch.ones(1)}
    assert refused(blob.pack(beyond), fisher) == "shape"
    assert refused(adapter, blob.pack(compact.encode({"s": torch.ones(3)}))) == "shape"
    assert refused(blob.pack({slot.name: torch.zeros(slot.shape)}), fisher) == "schema"
    assert refused(b"nonsense", fisher) == "schema"
    with pytest.raises(Rejected, match="takes no patches of kind"):
        intake.needed_blobs(lineage, "patch", key.sign("patch", dataclasses.replace(opened.patch, kind="dense@1")))


# --- one stage, several versions


def small_stage(folder: Path, family: str = "llama") -> tuple[Stage, VersionTable]:
    save_small(family, folder)
    stage = load_stage(read_checkpoint(folder), Span(1, 3))
    return stage, VersionTable(stage)


def update(stage: Stage, seed: int, every: int = 1) -> dict[str, Tensor]:
    """Of the weights of the whole model, some of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    slots = Kinds(["dense@1"]).find_slots(stage.base)
    return {
        slot.name: torch.randn(slot.shape, generator=generator) * (0.05 if index % every == 0 else 0.0)
        for index, slot in enumerate(slots)
    }


def version(number: int) -> VersionId:
    return VersionId(canonical.digest(str(number).encode()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_sessions_at_different_weights_run_beside_each_other(tmp_path: Path, family: str) -> None:
    stage, table = small_stage(tmp_path, family)
    model = canonical.digest(b"model")
    table.put(version(0), {})
    table.put(version(1), update(stage, 1))
    table.put(version(2), update(stage, 2))
    runner = Runner(stage, model, table, max_cached_tokens=1000)

    def session(number: int) -> InferenceSession:
        opened = runner.open(SessionRequest("0" * 32, model, version(number), "fp32", stage.span, 16))
        assert isinstance(opened, InferenceSession)
        return opened

    prompt = torch.randn(1, 4, stage.width, generator=torch.Generator().manual_seed(0))
    token = torch.randn(1, 1, stage.width, generator=torch.Generator().manual_seed(1))

    def run(numbers: list[int]) -> list[Tensor]:
        sessions = [session(number) for number in numbers]
        for each in sessions:
            runner.step([(each, 0, b"", bytes(CODEC.encode(prompt)))])
        outputs = runner.step([(each, 4, b"", bytes(CODEC.encode(token))) for each in sessions])
        assert not any(isinstance(output, Exception) for output in outputs)
        return [CODEC.decode(output, 1, stage.width) for output in outputs]  # type: ignore[arg-type]

    alone = [run([number])[0] for number in range(3)]
    together = run([0, 1, 2, 1, 0])
    for number, output in zip([0, 1, 2, 1, 0], together, strict=True):
        torch.testing.assert_close(output, alone[number], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    assert not torch.allclose(alone[1], alone[2], atol=1e-2)


def test_two_versions_of_weights_are_kept_and_sessions_keep_theirs(tmp_path: Path) -> None:
    stage, table = small_stage(tmp_path)
    table.put(version(0), {})
    table.put(version(1), update(stage, 1))
    kept = table.get(version(1))
    for number in range(2, 5):
        table.put(version(number), update(stage, number))
        assert len(table.versions) <= 1 + MAX_FOLDED
    assert table.versions == (version(0), version(3), version(4))
    with pytest.raises(NotFound):
        table.get(version(1))
    hidden = torch.randn(1, 3, stage.width)
    with torch.inference_mode():
        base = stage.forward(hidden, None, stage.span)
        old = stage.forward(hidden, None, stage.span, vectors=kept)
        assert torch.equal(stage.forward(hidden, None, stage.span, vectors=table.get(version(0))), base)
    assert not torch.allclose(old, base, atol=1e-2)


def test_weights_that_versions_share_are_kept_once(tmp_path: Path) -> None:
    stage, table = small_stage(tmp_path)
    first = update(stage, 1, every=3)
    table.put(version(1), first)
    held = table.get(version(1))
    hosted = {name for name, tensor in first.items() if bool(tensor.any()) and name.split(".")[1] in "12"}
    assert held.keys() == hosted
    second = {**first}
    changed = sorted(hosted)[0]
    second[changed] = first[changed] + 0.01
    table.put(version(2), second)
    shared = {name for name, tensor in table.get(version(2)).items() if tensor is held[name]}
    assert shared == hosted - {changed}
    assert weights_key(held) != weights_key(table.get(version(2)))
    table.put(version(3), second)
    assert weights_key(table.get(version(2))) == weights_key(table.get(version(3)))
    stacked = stack_states([table.get(version(2)), {**table.get(version(2)), "ia3:x": torch.ones(3) * 2}], [1, 2])
    assert stacked["ia3:x"].tolist() == [[1.0] * 3, [2.0] * 3, [2.0] * 3]
    assert weights_key(stacked) == weights_key(table.get(version(2)))


def test_updates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stage, table = small_stage(tmp_path)
    good = update(stage, 1)
    name = next(name for name in good if ".1." in name)
    for tensor, reason in (
        (torch.ones(3), "slot"),
        (torch.full_like(good[name], torch.nan), "finite"),
        (torch.ones_like(good[name], dtype=torch.int32), "slot"),
    ):
        with pytest.raises(Rejected) as refused:
            table.put(version(1), {name: tensor})
        assert refused.value.reason == reason
    with pytest.raises(Rejected):
        table.put(version(1), {"weight:layers.1.nothing.weight": torch.ones(3)})
    assert table.versions == ()


def test_quantised_weights_take_no_updates(tmp_path: Path) -> None:
    stage, table = small_stage(tmp_path)
    name = "weight:layers.1.mlp.up_proj.weight"
    stage.base.get_submodule("layers.1.mlp.up_proj").weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InvalidInput, match="quantised"):
        table.put(version(1), {name: torch.ones(48, 32)})
