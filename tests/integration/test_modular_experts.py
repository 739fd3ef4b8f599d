"""Modular experts of the starter model: trained, adopted, served in stages, updated, removed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.modular import Expert, place_of
from p2pmodel.domain.ports import Noted
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.evaluation import attached
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import Stage, load_stage
from p2pmodel.engine.steps import Note
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.engine.vectors import SessionVectors
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.asking.private import demand_vectors, private_vectors
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_change, patch_file_state, version_state
from p2pmodel.node.patches.blending import blend
from p2pmodel.node.patches.patchbook import open_patch
from p2pmodel.node.patches.rebasing import rebase
from p2pmodel.node.rounds.asides import propose_removal
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.node.versions.checkout import prove, verify_proof
from p2pmodel.node.versions.comparing import compare
from p2pmodel.node.versions.modular_experts import experts_of
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.tensors.experts import check_parent, read
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.patch_kind import KindOptions
from p2pmodel.tensors.smear import LEAD
from p2pmodel.wire import bundle
from tests.support.modular import KINDS, begin, contribute, small_trainings, write_domains

CODEC = get_codec("fp32")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_trainings():
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def grown(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lineage, Maintainer]:
    """A lineage whose second version has two experts, of different contributors and ranks."""
    home = Home.open(tmp_path_factory.mktemp("home"))
    lineage = begin(home, texts)
    maintainer = Maintainer(lineage, home.key.peer, starter.MODEL, lambda seconds: None)
    for name, rank in (("prose", 4), ("table", 6)):
        other = Home.open(tmp_path_factory.mktemp(name))
        contribute(lineage, other, texts / f"{name}.txt", KindOptions(expert=name, rank=rank))
    adopt(lineage, maintainer)
    return lineage, maintainer


def adopt(lineage: Lineage, maintainer: Maintainer) -> VersionId:
    """Proposes, examines and adopts what waits for the round, as its only maintainer."""
    waiting = tuple(p for p, patch in lineage.patches.items() if patch.parent == lineage.head)
    proposal = maintainer.propose(len(lineage.versions) + 1, lineage.head, waiting)
    assert proposal is not None
    for part in proposal.blobs:
        lineage.home.objects.put(part)
    record = lineage.home.key.sign("candidate", proposal.candidate)
    intake.store(lineage, "candidate", record, intake.needed_blobs(lineage, "candidate", record))
    lineage.refresh()
    version = next(v for v, candidate in lineage.candidates.items() if candidate == proposal.candidate)
    return accept(lineage, maintainer, version)


def accept(lineage: Lineage, maintainer: Maintainer, version: VersionId) -> VersionId:
    verdict = maintainer.examine(version)
    assert verdict.accept, verdict.reason
    intake.store(lineage, "verdict", lineage.home.key.sign("verdict", verdict), ())
    lineage.refresh()
    assert lineage.head == version
    return version


def some_ids(tokens: int, rows: int = 1) -> Tensor:
    """The beginning of each domain's text, or of one."""
    return torch.randint(0, 4096, (rows, tokens), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return load_whole(starter.MODEL)


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    checkpoint = read_checkpoint(starter.MODEL)
    return [load_stage(checkpoint, span) for span in (Span(0, 3), Span(3, 6))]


class Chain:
    """Two stages, each with a runner, that serve some versions of a lineage."""

    def __init__(self, stages: Sequence[Stage], lineage: Lineage, versions: Sequence[VersionId]) -> None:
        self.model = lineage.model
        self.runners = []
        for stage in stages:
            table = VersionTable(stage)
            for version in versions:
                table.put(version, version_state(lineage, version))
            self.runners.append(Runner(stage, lineage.model, table, max_cached_tokens=4096))

    def open(self, version: VersionId, rewinds: bool = False) -> list[Any]:
        spans = (Span(0, 3), Span(3, 6))
        return [
            runner.open(SessionRequest("s" * 32, self.model, version, "fp32", span, 256, 1, rewinds=rewinds))
            for runner, span in zip(self.runners, spans, strict=True)
        ]

    def load(self, session: Sequence[Any], own: Mapping[str, Tensor]) -> None:
        for runner, handle in zip(self.runners, session, strict=True):
            runner.load(handle, blob.pack(own))

    def step(self, sessions: Sequence[Sequence[Any]], hidden: Sequence[Tensor], at: Sequence[int]) -> list[Note]:
        """A step of each session; `hidden` becomes what comes out."""
        metas = [b""] * len(sessions)
        for stage, runner in enumerate(self.runners):
            batch = [
                (session[stage], position, meta, CODEC.encode(h.reshape(1, -1, h.shape[-1])))
                for session, position, meta, h in zip(sessions, at, metas, hidden, strict=True)
            ]
            for index, output in enumerate(runner.step(batch)):
                assert not isinstance(output, Exception), output
                body, metas[index] = (output.body, output.meta) if isinstance(output, Noted) else (output, metas[index])
                count = hidden[index].shape[1]
                hidden[index].copy_(CODEC.decode(body, count, hidden[index].shape[-1]).view(hidden[index].shape))
        return [Note.decode(meta, 1, h.shape[1]) for meta, h in zip(metas, hidden, strict=True)]


def test_experts_of_two_contributors_are_adopted_as_a_minor_version(grown: tuple[Lineage, Maintainer]) -> None:
    lineage, _ = grown
    version = lineage.versions[0]
    assert str(version.candidate.number) == "1.1.0"
    assert len(version.candidate.patches) == 2
    assert version.candidate.experts == (Expert("prose", 4), Expert("table", 6))
    state = version_state(lineage, version.id)
    own = [name for name in state if (place := place_of(name)) is not None and place.expert == "prose"]
    assert len(own) == 6 * 4
    verify_proof(prove(lineage, version.id))
    views = experts_of(lineage, version.id)
    assert [(view.name, view.since, len(view.contributions)) for view in views] == [
        ("prose", "1.1.0", 1),
        ("table", "1.1.0", 1),
    ]


def test_two_stages_give_what_the_whole_model_gives(
    grown: tuple[Lineage, Maintainer], whole: PreTrainedModel, stages: list[Stage], texts: Path
) -> None:
    """A prompt in chunks, then token by token, two sessions at two versions in one batch; one that goes back."""
    lineage, _ = grown
    first = lineage.versions[0].id
    text = (texts / "table.txt").read_text()
    ids = torch.tensor([load_tokenizer(starter.MODEL)(text)["input_ids"][: LEAD + 14]])
    end = ids.shape[1]
    state = version_state(lineage, first)
    expected: dict[VersionId, Tensor] = {}
    inputs = whole.base_model.get_input_embeddings()(ids).detach()
    last = whole.base_model.get_submodule("layers.5")
    for version in (first, lineage.model):
        with attached(whole, Kinds(KINDS), state) as applier, torch.inference_mode():
            caught: list[Tensor] = []
            handle = last.register_forward_hook(lambda module, args, output, caught=caught: caught.append(output))
            with applier.use(version_state(lineage, version)):
                whole.base_model(input_ids=ids, use_cache=False)
            handle.remove()
            expected[version] = caught[0].clone()
    assert not torch.allclose(expected[first][:, LEAD:], expected[lineage.model][:, LEAD:], atol=1e-3)
    assert torch.equal(expected[first][:, :LEAD], expected[lineage.model][:, :LEAD])

    chain = Chain(stages, lineage, [first, lineage.model])
    sessions = [chain.open(first, rewinds=True), chain.open(lineage.model), chain.open(first)]
    versions = [first, lineage.model, first]
    found = [torch.empty(1, 0, inputs.shape[-1])] * 3
    notes = []
    for start, stop in ((0, 20), (20, LEAD + 4), *((at, at + 1) for at in range(LEAD + 4, end))):
        parts = [inputs[:, start:stop].clone() for _ in sessions]
        notes += [chain.step(sessions, parts, [start] * 3)]
        found = [torch.cat([old, new], dim=1) for old, new in zip(found, parts, strict=True)]
    for version, output in zip(versions, found, strict=True):
        torch.testing.assert_close(output, expected[version], atol=2e-4, rtol=1e-4)
    decided = [(step, note) for step, notes_of in enumerate(notes) for note in notes_of if note.shares is not None]
    assert [step for step, _ in decided] == [1, 1]
    shares = decided[0][1].shares
    assert decided[0][1].routed == 6
    assert shares is not None
    assert float(shares[0, 1] / 6) > 0.5, "the table's expert has most of the table"
    again = inputs[:, end - 1 :].clone()
    chain.step(sessions[:1], [again], [end - 1])
    torch.testing.assert_close(again, expected[first][:, -1:], atol=2e-4, rtol=1e-4)


def test_an_update_is_a_patch_and_removing_gives_back_every_bit(
    grown: tuple[Lineage, Maintainer], texts: Path, tmp_path: Path
) -> None:
    lineage, maintainer = grown
    base = maintainer._examiner.score(version_state(lineage, lineage.model), "test")
    one = maintainer._examiner.score(version_state(lineage, lineage.versions[0].id), "test")
    assert one["prose"] < base["prose"]
    assert one["table"] < base["table"]
    for seed, name in enumerate(("a", "b")):
        home = Home.open(tmp_path / name)
        contribute(lineage, home, texts / "prose.txt", KindOptions(expert="prose"), seed=seed)
    adopt(lineage, maintainer)
    assert str(lineage.number(lineage.head)) == "1.1.1"
    before, after = version_state(lineage, lineage.versions[0].id), version_state(lineage, lineage.head)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    places = [place_of(name) for name in changed]
    assert {place.expert for place in places if place} == {"prose"}

    with pytest.raises(NotFound, match="has no expert 'law'"):
        propose_removal(lineage, ["law"])
    _, version = propose_removal(lineage, ["prose"])
    accept(lineage, maintainer, version)
    assert str(lineage.number(lineage.head)) == "1.2.0"
    _, version = propose_removal(lineage, ["table"])
    accept(lineage, maintainer, version)
    assert str(lineage.number(lineage.head)) == "1.3.0"
    assert maintainer._examiner.score(version_state(lineage, lineage.head), "test") == base
    verify_proof(prove(lineage, lineage.head))
    assert compare(lineage, lineage.model, lineage.versions[0].id).added == ("prose", "table")

    # A patch of an expert that is gone, or that was never merged, goes onto a later version as it is.
    brought = next(p for p in lineage.versions[0].candidate.patches if experts_in_patch(lineage, p) == {"table"})
    moved = rebase(open_patch(lineage.home.path, brought), lineage, lineage.head, tmp_path / "moved")
    opened = bundle.open_bundle((tmp_path / "moved").read_bytes())
    assert opened.raw.adapter == lineage.home.objects.load(lineage.patches[brought].adapter.digest)
    assert not moved.dropped
    state = patch_file_state(lineage, tmp_path / "moved")
    assert maintainer._examiner.score(state, "test")["table"] < base["table"]


def experts_in_patch(lineage: Lineage, patch: PatchId) -> set[str]:
    places = map(place_of, patch_change(lineage, lineage.patches[patch]).values)
    return {place.expert for place in places if place is not None}


def test_parts_of_experts_that_are_nowhere_are_refused(grown: tuple[Lineage, Maintainer]) -> None:
    lineage, _ = grown
    slot = "expert:layers.0.experts.law.router"
    pools = [slot for slot in lineage.manifest.slots if slot.name.startswith("expert:")]
    change = read(blob.pack({slot: torch.zeros(256)}), pools, 1 << 20)
    with pytest.raises(Rejected, match="'law', which its parent version lacks"):
        check_parent(change, pools, ())


def test_a_session_carries_an_expert_that_is_not_merged(
    grown: tuple[Lineage, Maintainer], whole: PreTrainedModel, stages: list[Stage], texts: Path
) -> None:
    lineage, _ = grown
    first = lineage.versions[0].id
    both = {name: t for name, t in version_state(lineage, first).items() if place_of(name) is not None}
    (patch,) = [p for p in lineage.versions[0].candidate.patches if experts_in_patch(lineage, p) == {"table"}]
    begins, table = private_vectors(lineage, patch)
    assert begins == lineage.model
    assert table.keys() == {name for name in both if ".table." in name}
    chain = Chain(stages, lineage, [first, lineage.model])
    merged, carried, one, plain = chain.open(first), *(chain.open(lineage.model) for _ in range(3))
    chain.load(carried, both)
    chain.load(one, table)
    ids = load_tokenizer(starter.MODEL)((texts / "table.txt").read_text())["input_ids"][: LEAD + 4]
    hidden = whole.base_model.get_input_embeddings()(torch.tensor([ids])).detach()
    sessions, outputs = (merged, carried, one, plain), [hidden.clone() for _ in range(4)]
    prompts = [output[:, : LEAD + 3].clone() for output in outputs]
    notes = chain.step(sessions, prompts, [0] * 4)
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.allclose(prompts[2], prompts[3], atol=1e-4)
    assert [None if note.shares is None else note.shares.shape[1] for note in notes] == [3, 3, 2, None]
    together = [output[:, LEAD + 3 :].clone() for output in outputs]
    chain.step(sessions, together, [LEAD + 3] * 4)
    torch.testing.assert_close(together[0], together[1])


def test_what_no_session_carries(grown: tuple[Lineage, Maintainer], stages: list[Stage]) -> None:
    lineage, _ = grown
    patch = lineage.versions[0].candidate.patches[0]
    _, own = private_vectors(lineage, patch)
    chain = Chain(stages, lineage, [lineage.model])
    down, up, router = (next(name for name in own if name.endswith(part)) for part in ("down", "up", "router"))
    ranks = own | {up: torch.zeros(1, stages[0].width)}
    for state, why in (
        ({name: t for name, t in own.items() if name != router}, "comes without its router"),
        (ranks, "has two ranks"),
        (own | {down: own[down][:, :-1].contiguous()}, "no place for slot"),
        (own | {down: torch.zeros(0, stages[0].width), up: torch.zeros(0, stages[0].width)}, "no place for slot"),
        (own | {router: torch.full_like(own[router], 2e4)}, "values beyond 10000"),
        (own | {router: torch.full_like(own[router], torch.nan)}, "finite"),
        ({down.replace("layers.", "elsewhere."): own[down]}, "travel with a session"),
    ):
        with pytest.raises(Rejected, match=why):
            chain.load(chain.open(lineage.model), state)
    with pytest.raises(InvalidInput, match="not trained through the swarm"):
        demand_vectors(own)
    with pytest.raises(Rejected, match="travel with a session"):
        SessionVectors(stages[0]).read(blob.pack(own), Span(0, 3), by_row=True)


def test_experts_are_not_merged_by_hand(grown: tuple[Lineage, Maintainer], tmp_path: Path) -> None:
    lineage, _ = grown
    with pytest.raises(InvalidInput, match="a round takes them in"):
        blend(lineage.home, lineage.versions[0].candidate.patches, tmp_path / "merged", None, {}, 1.0, None, False)
    assert not (tmp_path / "merged").exists()


def test_what_is_trained_stands_on_the_experts_that_are_there(
    grown: tuple[Lineage, Maintainer], whole: PreTrainedModel
) -> None:
    lineage, _ = grown
    state = version_state(lineage, lineage.versions[0].id)
    # Rows that are found are so sure of themselves that no gradient comes through.
    state |= {name: tensor * 0.01 for name, tensor in state.items() if name.endswith(".gate")}
    ids = torch.randint(0, 4096, (2, LEAD + 9), generator=torch.Generator().manual_seed(0))
    blocks = Blocks.of_ids(ids)
    with attached(whole, Kinds(KINDS), state) as applier, applier.use(state), torch.no_grad():
        expected = row_nats(whole, blocks)
    options = {"ia3@1": KindOptions(), "expert@1": KindOptions(router=True)}
    for kind, chosen in options.items():
        trainee = new_trainee(whole, kind, state, blocks, chosen, 0)
        with trainee.use():
            loss = row_nats(whole, blocks)
        torch.testing.assert_close(loss.detach(), expected)
        gradients = torch.autograd.grad(loss.sum(), list(trainee.parameters.values()))
        assert any(bool(gradient.any()) for gradient in gradients)
        trainee.remove()
    assert trainee.parameters.keys() == {name for name in state if name.endswith((".router", ".gate"))}
    with pytest.raises(InvalidInput, match="'No Name' is no name"):
        new_trainee(whole, "expert@1", state, blocks, KindOptions(expert="No Name"), 0)
