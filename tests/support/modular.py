"""Two domains that an expert learns in seconds, and contributors of experts for them."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from p2pmodel import starter
from p2pmodel.domain.model import Limits, Schedule
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.patches.contributing import Assignment, train_patch
from p2pmodel.store.home import Home
from p2pmodel.tensors import gates
from p2pmodel.tensors.patch_kind import KindOptions

KINDS = ("ia3@1", "expert@1")
OPTIONS = TrainingOptions(
    steps=8, batch=4, sequence=96, learning_rate=1e-2, checkpoint_every=8, fisher_examples=2, held_out_blocks=2
)


@contextmanager
def small_trainings() -> Iterator[None]:
    """Within: one thread, and router rows from few examples."""
    before = torch.get_num_threads(), gates.OWN_EXAMPLES, gates.WRITTEN_EXAMPLES
    torch.set_num_threads(1)
    gates.OWN_EXAMPLES, gates.WRITTEN_EXAMPLES = 32, 24
    yield
    gates.OWN_EXAMPLES, gates.WRITTEN_EXAMPLES = before[1:]
    torch.set_num_threads(before[0])


def write_domains(folder: Path) -> Path:
    """prose.txt and table.txt, and an exam of both."""
    chance = random.Random(0)
    words = [
        "the",
        "river",
        "a",
        "stone",
        "under",
        "over",
        "green",
        "old",
        "house",
        "runs",
        "sleeps",
        "and",
        "quietly",
        "never",
    ]
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


def begin(home: Home, exam: Path) -> Lineage:
    founding = Founding(
        name="modular",
        maintainers=(home.key.peer,),
        threshold=1,
        exam=exam,
        schedule=Schedule(min_patches=1),
        limits=Limits(regression_tolerance=0.02),
        kinds=KINDS,
    )
    return found(home, starter.MODEL, founding)


def contribute(lineage: Lineage, home: Home, file: Path, options: KindOptions, seed: int = 0) -> None:
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
    output, chosen = file.parent / "new.p2patch", replace(OPTIONS, seed=seed)
    train_patch(
        Assignment(own, starter.MODEL, own.head, "expert@1", (file,), options=chosen, kind_options=options),
        output,
        lambda step: None,
    )
    intake.take_in(lineage, output.read_bytes())
    lineage.refresh()
