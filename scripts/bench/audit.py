"""How often replaying 1, 2 or 4 segments of a training finds what is wrong with it.

    python scripts/bench/audit.py [--segments 12] [--every 4]

A training on the starter model, honest or tampered with, is replayed segment by segment as `p2pmodel patch audit` does.
An audit draws N of K segments: it finds what is wrong unless it draws none of the d that differ, so that its chance is
1 - C(K-d, N) / C(K, N). Every tampering keeps its lie consistent: its states lead to its adapter.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from p2pmodel import starter
from p2pmodel.domain.ids import Digest
from p2pmodel.engine import data
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.training.auditing import replay_segment
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.patches.auditing import OTHER, Audit, audit
from p2pmodel.node.patches.contributing import Assignment, train_patch
from p2pmodel.node.patches.patchbook import OpenedPatch, open_patch
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.patch_kind import KindOptions
from p2pmodel.wire import canonical

DRAWN = (1, 2, 4)
TEXT = "A lineage grows by patches, and every patch names its parent, its data and its recipe. "


@dataclass(frozen=True)
class Bench:
    """An honest training, and what is needed to make others."""

    lineage: Lineage
    files: tuple[Path, Path]
    opened: OpenedPatch
    options: TrainingOptions

    def find(self, digest: Digest) -> bytes | None:
        objects = self.lineage.home.objects
        return objects.load(digest) if objects.has(digest) else None

    def audit(self, opened: OpenedPatch) -> Audit:
        every = len(opened.patch.provenance.states)
        return audit(opened, starter.MODEL, self.files[:1], self.find, segments=every, seed=0)

    def provenance(self, **changes: object) -> OpenedPatch:
        changed = replace(self.opened.patch.provenance, **changes)  # type: ignore[arg-type]
        return replace(self.opened, patch=replace(self.opened.patch, provenance=changed))

    def recipe(self, **changes: object) -> OpenedPatch:
        return self.provenance(recipe=replace(self.opened.patch.provenance.recipe, **changes))  # type: ignore[arg-type]

    def on_other_data(self, segments: range) -> OpenedPatch:
        """The honest training with these segments on other texts than it names."""
        blocks = [self._blocks(file) for file in self.files]
        provenance = self.opened.patch.provenance
        states, checkpoints = [provenance.states[0]], [provenance.checkpoints[0]]
        model, put = load_whole(starter.MODEL), self.lineage.home.objects.put
        parent = version_state(self.lineage, self.lineage.head)
        trainee = new_trainee(model, "ia3@1", parent, blocks[0], KindOptions(), self.options.seed)
        for at in range(len(provenance.states) - 1):
            state = self.find(states[-1])
            assert state is not None
            steps = range(provenance.step_of(at), provenance.step_of(at + 1))
            done = replay_segment(model, trainee, blocks[at in segments], self.options, state, steps)
            states.append(put(done.state).digest)
            checkpoints.append(put(done.after).digest)
        trainee.remove()
        opened = self.provenance(states=tuple(states), checkpoints=tuple(checkpoints))
        adapter = self.lineage.home.objects.load(checkpoints[-1])
        ref = replace(opened.patch.adapter, digest=checkpoints[-1], size=len(adapter))
        return replace(opened, patch=replace(opened.patch, adapter=ref), adapter=adapter, fisher=b"")

    def _blocks(self, file: Path) -> data.Blocks:
        corpus = data.load((file,), load_tokenizer(starter.MODEL))
        return data.split(corpus, sequence=self.options.sequence, seed=self.options.seed).train


def begin(folder: Path, segments: int, every: int) -> Bench:
    files = (folder / "named.txt", folder / "other.txt")
    files[0].write_text("".join(f"{n}: {TEXT}" for n in range(300)))
    files[1].write_text("".join(f"{n}: {TEXT[::-1]}" for n in range(300)))
    home = Home.open(folder / "home")
    lineage = found(home, starter.MODEL, Founding(starter.NAME, (home.key.peer,), 1, starter.EXAM))
    options = TrainingOptions(
        steps=segments * every, batch=1, sequence=64, learning_rate=5e-3, fisher_examples=4, checkpoint_every=every
    )
    assignment = Assignment(lineage, starter.MODEL, lineage.head, "ia3@1", files[:1], options=options)
    train_patch(assignment, folder / "honest.p2patch", lambda step: None)
    return Bench(lineage, files, open_patch(home.path, str(folder / "honest.p2patch")), options)


def forged_fisher(bench: Bench) -> OpenedPatch:
    """That claims a thousand times the weight in the merge for every other value."""
    held = blob.unpack(bench.opened.fisher, None, len(bench.opened.fisher))
    shapes = {n: t.shape for n, t in blob.unpack(bench.opened.adapter, None, len(bench.opened.adapter)).items()}
    fisher = compact.Decoded(bench.opened.fisher, tuple((n, tuple(s)) for n, s in sorted(shapes.items())), 1 << 30)
    assert held
    forged = {name: torch.where(torch.arange(len(t)) % 2 == 0, t * 1000, t) for name, t in fisher.items()}
    raw = blob.pack(compact.encode(forged))
    ref = replace(bench.opened.patch.fisher, digest=canonical.digest(raw), size=len(raw))
    return replace(bench.opened, patch=replace(bench.opened.patch, fisher=ref), fisher=raw)


def other_file(bench: Bench) -> OpenedPatch:
    """Trained on other texts throughout, and names what it was not trained on."""
    return bench.on_other_data(range(1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="steps of a segment")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = begin(Path(folder), asked.segments, asked.every)
        middle = asked.segments // 2
        cases: dict[str, Callable[[], OpenedPatch]] = {
            "honest": lambda: bench.opened,
            "one segment on other data": lambda: bench.on_other_data(range(middle, middle + 1)),
            "a third of the segments on other data": lambda: bench.on_other_data(range(asked.segments // 3)),
            "all of it on other data": lambda: other_file(bench),
            "learning rate 10 % higher than named": lambda: bench.recipe(learning_rate=4.5e-3),
            "learning rate 1 % higher than named": lambda: bench.recipe(learning_rate=4.95e-3),
            "another seed than named": lambda: bench.recipe(seed=1),
            "a Fisher of its own making": lambda: forged_fisher(bench),
        }
        print(f"{'':40}{'differ':>8}" + "".join(f"{f'N = {n}':>8}" for n in DRAWN) + f"{'apart':>10}")
        for name, make in cases.items():
            began = time.monotonic()
            report = bench.audit(make())
            differing = sum(segment.verdict == OTHER for segment in report.segments)
            always = bool(report.problems) and not differing
            chances = [1.0 if always else chance(report.of, differing, n) for n in DRAWN]
            figures = "".join(f"{share:>8.0%}" for share in chances)
            apart = max(segment.apart for segment in report.segments)
            print(
                f"{name:40}{differing:>5}/{report.of}{figures}{apart:>10.2g}  {time.monotonic() - began:.0f} s",
                flush=True,
            )


def chance(segments: int, differing: int, drawn: int) -> float:
    return 1 - comb(segments - differing, drawn) / comb(segments, drawn)


if __name__ == "__main__":
    main()
