"""Modular experts of the starter model: trained, adopted, served in stages, updated, removed."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p2pmodel import starter
from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.model import Limits, Schedule
from p2pmodel.domain.modular import Expert, place_of
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.evaluation import attached
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.trainees import KindOptions
from p2pmodel.engine.versions import VersionTable
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.patches.contributing import Assignment, train_patch
from p2pmodel.node.rounds import removing
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.store.home import Home
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.smear import LEAD
from p2pmodel.wire.signing import Key

KINDS = ("ia3@1", "expert@1")
OPTIONS = TrainingOptions(
    steps=8, batch=4, sequence=96, learning_rate=1e-2, checkpoint_every=6, fisher_examples=2, held_out_blocks=2
)
CODEC = get_codec("fp32")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains to learn, and an exam of them."""
    folder = tmp_path_factory.mktemp("texts")
    chance = random.Random(0)
    words = "the river a stone under over green old house runs sleeps and quietly never".split()
    lines = {
        "prose": lambda: " ".join(chance.choices(words, k=12)).capitalize() + ".",
        "table": lambda: ";".join(str(chance.randrange(100, 1000)) for _ in range(8)),
    }
    index = 'name = "two"\nlicence = "CC0-1.0"\n'
    for name, line in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(line() for _ in range(400)))
        for split in ("tune", "test"):
            text = json.dumps({"text": "\n".join(line() for _ in range(12))})
            (folder / f"{name}.{split}.jsonl").write_text(text + "\n")
        index += f'[[domain]]\nname = "{name}"\ntune = "{name}.tune.jsonl"\ntest = "{name}.test.jsonl"\n'
    (folder / "exam.toml").write_text(index)
    return folder


@pytest.fixture(scope="module")
def grown(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lineage, Maintainer]:
    """A lineage whose second version has two experts, of different contributors and ranks."""
    home = Home.open(tmp_path_factory.mktemp("home"))
    lineage = found(
        home,
        starter.MODEL,
        Founding(
            name="modular",
            maintainers=(home.key.peer,),
            threshold=1,
            exam=texts,
            schedule=Schedule(min_patches=1),
            limits=Limits(regression_tolerance=0.02),
            kinds=KINDS,
        ),
    )
    maintainer = Maintainer(lineage, home.key.peer, starter.MODEL, lambda seconds: None)
    for name, rank in (("prose", 4), ("table", 6)):
        other = Home.open(tmp_path_factory.mktemp(name))
        contribute(lineage, other, texts / f"{name}.txt", KindOptions(expert=name, rank=rank))
    adopt(lineage, maintainer)
    return lineage, maintainer


def contribute(lineage: Lineage, home: Home, file: Path, options: KindOptions, kind: str = "expert@1") -> None:
    """A patch by the home's key, in the lineage's round."""
    own = Lineage.create(home, lineage.home.objects.load(lineage.model))
    for row in lineage.home.index.records(lineage.model):
        if row.kind != "manifest":
            record = lineage.home.objects.load(row.record.digest)
            refs = intake.needed_blobs(own, row.kind, record)
            for ref in refs:
                home.objects.put(lineage.home.objects.load(ref.digest))
            intake.store(own, row.kind, record, refs)
            own.refresh()
    output = home.objects.folder.parent / "new.p2patch" if hasattr(home.objects, "folder") else file.parent / "new"
    train_patch(
        Assignment(own, starter.MODEL, own.head, kind, (file,), options=OPTIONS, kind_options=options),
        output,
        lambda step: None,
    )
    intake.take_in(lineage, output.read_bytes())
    lineage.refresh()


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
    return torch.randint(0, 4096, (rows, tokens), generator=torch.Generator().manual_seed(3))


def test_experts_of_two_contributors_are_adopted_as_a_minor_version(grown: tuple[Lineage, Maintainer]) -> None:
    lineage, _ = grown
    version = lineage.versions[0]
    assert str(version.candidate.number) == "1.1.0"
    assert len(version.candidate.patches) == 2
    assert version.candidate.experts == (Expert("prose", 4), Expert("table", 6))
    state = version_state(lineage, version.id)
    own = [name for name in state if (place := place_of(name)) is not None and place.expert == "prose"]
    assert len(own) == 6 * 4
