#!/usr/bin/env python
"""Does it work? A model improved in rounds by several contributors, against the same training done in one place.

    python scripts/bench/collective.py [--kind ia3|dense …] [--seeds 0 1 2] [--section …] [--results FILE]
                                       [--steps 160] [--rows 2] [--sequence 64] [--plots FOLDER]

Each contributor has the text of one domain that the starter model has not seen, and makes `--steps` steps of `--rows`
rows in all, cut into rounds. All of it is the product's own: trainees, optimiser, schedule, blobs, control variates and
merge strategies; only the network is not there. What is held out of every domain is in two halves: learning rates and α
are found on the one, and what is reported is of the other: the loss in nats per token, mean of the domains, and the
"gain", how far it is below the base model's.

- pooled: one process with everybody's data and the same total compute, its learning rate tuned;
- data parallel: a mean gradient of all contributors in every step, tuned; its bytes are what each one uploads in fp32;
- rounds: mean, Fisher-weighted, and control variates, in 32, 4 and 1 bits a value, at the rate tuned for rounds.

Sections: rounds; bits (every rule in 32, 4 and 1 bits a value, at 10 rounds); choices (what each part of it is worth,
at 10 rounds); network (contributors that come and go, come late, have unequal data, are 2 to 16); transfer (a domain
that nobody trained on, before and after fine-tuning). Learning rates are found first, on seed 0.

Every finished run is a line of `--results`, and is not done again; the tables are made of these lines.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from math import prod
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel import starter
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.model import Limits, Slot
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.data.packing import text_blocks
from p2pmodel.engine.training.loop import Run, frozen
from p2pmodel.engine.training.optimising import Optimiser
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.sensitivity import fisher_of
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.logic.judgement import why_leave_out, why_reject
from p2pmodel.tensors import blob, compact, control, fourbit, variates
from p2pmodel.tensors.changes import Flat, end_to_end
from p2pmodel.tensors.kinds import Kinds, get_kind
from p2pmodel.tensors.merging import Contribution, apply_update, get_strategy
from p2pmodel.tensors.patch_kind import KindOptions, Trainee

State = dict[str, Tensor]
Point = tuple[int, float, float]
"""Rounds done, bytes that a contributor has uploaded, the loss."""
DOMAINS = ("asyncio", "distutils", "email", "tkinter")
UNSEEN = "xml"
RATES = {
    "ia3": {"pooled": (2e-3, 4e-3, 1e-2), "data parallel": (4e-3, 1e-2, 2e-2), "rounds": (1e-2, 2e-2, 4e-2)},
    "dense": {"pooled": (1e-4, 2e-4, 5e-4), "data parallel": (2e-4, 5e-4, 1e-3), "rounds": (2e-4, 5e-4, 1e-3)},
}
"""That are tried; the best of each lies inside."""
ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
HELD_OUT_ROWS = 64
"""Of each half, of every domain."""
ESTIMATING_STEPS = 4
POINTS = 5
"""Of a curve, at most: looking costs as much as several steps."""
UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class Arm:
    """One way of improving the model. alpha: 0 for the best on the tuning half, merge by merge. feedback: of what
    rounding took away. keep: the optimiser's state, from round to round. churn: half of the contributors are new each
    time; late: half come when half of the rounds are over; unequal: each has a quarter of the data of the one before;
    estimates: newcomers measure a control variate on a few batches, and else have none in their first round; exam: as
    maintainers hold it, on the tuning half; general: share of every contributor's text that is of no domain; scale: of
    the rate that is best for rounds.
    """

    way: str = "rounds"
    rounds: int = 10
    strategy: str = "mean@1"
    variates: bool = False
    bits: int = 32
    feedback: bool = False
    alpha: float = 1.0
    momentum: float = 0.0
    keep: bool = True
    churn: bool = False
    late: bool = False
    unequal: bool = False
    estimates: bool = False
    contributors: int = 4
    exam: bool = False
    general: float = 0.0
    scale: float = 1.0

    def __str__(self) -> str:
        crowd = [f"{self.contributors} contributors"] * (self.contributors != 4)
        if self.way != "rounds":
            return ", ".join([self.way, *crowd])
        words = [f"{self.rounds} rounds" if self.rounds > 1 else "one shot", self.strategy.removesuffix("@1")]
        words += ["control variates"] * self.variates + [{4: "4 bits", 1: "1 bit"}.get(self.bits, "")] * (
            self.bits < 32
        )
        words += ["error feedback"] * self.feedback
        words += [f"α {self.alpha:g}" if self.alpha else "best α"] * (self.alpha != 1) + [
            f"momentum {self.momentum:g}"
        ] * (self.momentum > 0)
        words += ["optimiser reset"] * (not self.keep) + ["half new each round"] * self.churn
        words += ["newcomers measure theirs"] * self.estimates
        words += ["half come late"] * self.late + ["unequal data"] * self.unequal + ["exam"] * self.exam
        words += [f"{self.general:.0%} general text"] * (self.general > 0)
        words += [f"rate × {self.scale:g}"] * (self.scale != 1)
        return ", ".join(words + crowd)


class Texts:
    """The domains' tokens: what is learned from, and the two halves of what is held out."""

    def __init__(self, sequence: int) -> None:
        tokenizer = load_tokenizer(starter.MODEL)
        self.train: dict[str, Blocks] = {}
        self.tune: dict[str, Blocks] = {}
        self.test: dict[str, Blocks] = {}
        for domain in (*DOMAINS, UNSEEN):
            text = (starter.DOMAINS / f"{domain}.txt").read_text(encoding="utf-8")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            blocks = text_blocks(ids, sequence)
            first = len(blocks) - 2 * HELD_OUT_ROWS
            self.train[domain] = blocks[:first]
            self.tune[domain] = blocks[torch.arange(first, len(blocks), 2)]
            self.test[domain] = blocks[torch.arange(first + 1, len(blocks), 2)]
        self._sequence, self._tokenizer = sequence, tokenizer

    @cached_property
    def general(self) -> Blocks:
        """Of the modules of the standard library, which the starter model knows."""
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "\n".join(module.read_text(encoding="utf-8") for module in modules)
        return text_blocks(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], self._sequence)


class Bench:
    """One kind and one seed."""

    def __init__(self, kind: str, seed: int, args: argparse.Namespace, rates: Mapping[str, float]) -> None:
        self.kind, self.seed, self.args, self.rates = kind, seed, args, rates
        self.texts = Texts(args.sequence)
        self.judge: PreTrainedModel = load_whole(starter.MODEL)
        kinds = Kinds((f"{kind}@1",))
        self.slots = kinds.find_slots(self.judge.base_model)
        self.base: State = kinds.initial(self.slots)
        self.values = sum(prod(slot.shape) for slot in self.slots)
        self.judging = new_trainee(self.judge, f"{kind}@1", self.base, self.texts.tune[UNSEEN], KindOptions(), 0)

    @torch.no_grad()
    def losses(self, state: State, half: Mapping[str, Blocks], domains: Sequence[str] = DOMAINS) -> dict[str, float]:
        """Nats per token."""
        for name, parameter in self.judging.parameters.items():
            parameter.copy_(state[name])
        found = {}
        options = TrainingOptions(batch=32, sequence=self.args.sequence)
        with frozen(self.judge, self.judging):
            for domain in domains:
                found[domain] = Run(self.judge, self.judging, half[domain], half[domain], options, {}).held_out_loss()
        return found

    def options(self, way: str, **more: int) -> TrainingOptions:
        given = {"steps": self.args.steps, "batch": self.args.rows, **more}
        return TrainingOptions(
            sequence=self.args.sequence, learning_rate=self.rates[way], schedule="wsd", seed=1000 * self.seed, **given
        )

    def improved(self, arm: Arm) -> tuple[State, float, list[Point]]:
        """(the state, bytes that a contributor has uploaded, what it was after each round)."""
        if arm.way == "base":
            return self.base, 0.0, []
        if arm.way in ("pooled", "data parallel"):
            return self.together(arm)
        return self.in_rounds(arm)

    def together(self, arm: Arm) -> tuple[State, float, list[Point]]:
        """As many rows as all contributors see: in as many more steps, or in as many more rows a step."""
        if arm.way == "pooled":
            options = self.options(arm.way, steps=self.args.steps * arm.contributors)
        else:
            options = self.options(arm.way, batch=self.args.rows * arm.contributors)
        worker = Worker(self.kind, Blocks.join([self.texts.train[d] for d in DOMAINS]), options, self.base, False)
        worker.work(options.steps, None, False)
        sent = 4.0 * self.values * self.args.steps if arm.way == "data parallel" else 0.0
        return worker.state(), sent, []

    def in_rounds(self, arm: Arm) -> tuple[State, float, list[Point]]:
        workers, strategy = self.workers(arm), get_strategy(arm.strategy)
        steps, chance = self.args.steps // arm.rounds, torch.Generator().manual_seed(self.seed)
        state, sent, curve = self.base, 0.0, []
        velocity = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.base.items()}
        average: State | None = None
        for number in range(arm.rounds):
            if arm.churn and number:
                for leaver in torch.randperm(len(workers), generator=chance)[: len(workers) // 2].tolist():
                    workers[leaver] = workers[leaver].successor(number, steps)
            present = workers[: len(workers) // 2] if arm.late and number < arm.rounds // 2 else workers
            given, gradients, sizes = [], [], []
            for at, worker in enumerate(present):
                if not arm.keep:
                    worker.reset()
                worker.begin(state)
                worker.work(steps, average, arm.variates)
                update, size = worker.update(state, arm.bits, arm.feedback)
                fisher, of_fisher = worker.fisher(self.slots) if arm.strategy == "fisher@1" else ({}, 0)
                patch = PatchId(hashlib.sha256(f"{number}/{at}".encode()).hexdigest())
                given.append(Contribution(patch, update, fisher, 1.0, relative=True))
                of_variate = 0
                if arm.variates:
                    gradient, of_variate = worker.variate(steps)
                    gradients.append(variates.Variate(patch, f"{self.kind}@1", gradient, 1.0))
                sizes.append(size + of_fisher + of_variate)
            sent += mean(sizes)
            given.sort(key=lambda contribution: contribution.patch)
            if arm.exam:
                given = self.those_that_help(state, given)
            merged = strategy.combine(state, given, {}) if given else {}
            if arm.momentum:
                velocity = {name: arm.momentum * velocity[name] + merged[name] for name in merged}
                merged = {name: merged[name] + arm.momentum * velocity[name] for name in merged}
            after = apply_update(state, merged, arm.alpha or self.best_alpha(state, merged)) if merged else state
            if not arm.exam or not why_reject(self.tuned(state), self.tuned(after), Limits()):
                state = after
            if arm.variates and given:
                merged_too = {contribution.patch for contribution in given}
                gradients = [gradient for gradient in gradients if gradient.patch in merged_too]
                gradients.sort(key=lambda variate: variate.patch)
                average = self.averaged(gradients)
            if (number + 1) % max(1, arm.rounds // POINTS) == 0:
                curve.append((number + 1, sent, mean(self.losses(state, self.texts.test).values())))
        return state, sent, curve

    def tuned(self, state: State) -> dict[str, float]:
        return self.losses(state, self.texts.tune)

    def those_that_help(self, state: State, given: Sequence[Contribution]) -> list[Contribution]:
        before = self.tuned(state)
        return [one for one in given if not why_leave_out(before, self.tuned(apply_update(state, one.adapter, 1.0)))]

    def averaged(self, gradients: Sequence[variates.Variate]) -> State:
        raw = variates.write_mean(gradients, (f"{self.kind}@1",), self.slots)
        assert raw is not None
        return variates.read_mean(raw, (f"{self.kind}@1",), self.slots, UNBOUNDED)

    def best_alpha(self, state: State, merged: Mapping[str, Tensor]) -> float:
        def loss(alpha: float) -> float:
            return mean(self.tuned(apply_update(state, merged, alpha)).values())

        return min(ALPHAS, key=loss)

    def workers(self, arm: Arm) -> list["Worker"]:
        """A domain each; more contributors than domains have a part of one each, fewer have several."""
        options, found = self.options("rounds"), []
        options = replace(options, learning_rate=arm.scale * options.learning_rate)
        for at in range(arm.contributors):
            own = [domain for number, domain in enumerate(DOMAINS) if number % arm.contributors == at % len(DOMAINS)]
            sharing = max(1, arm.contributors // len(DOMAINS))
            blocks = Blocks.join([self.texts.train[domain] for domain in own])
            blocks = blocks[torch.arange(at // len(DOMAINS), len(blocks), sharing)]
            if arm.unequal:
                blocks = blocks[: max(8, len(blocks) // 4**at)]
            if arm.general:
                rows = round(len(blocks) * arm.general / (1 - arm.general))
                blocks = Blocks.join([blocks, self.texts.general[torch.arange(rows) * arm.contributors + at]])
            found.append(
                Worker(self.kind, blocks, replace(options, seed=options.seed + 1 + at), self.base, arm.estimates)
            )
        return found

    def transfer(self, state: State, rate: float) -> dict[str, float]:
        """The loss on what is reported of a domain that nobody trained on: from `state` on, before and after a
        fine-tuning of as many steps as contributors made."""
        before = self.losses(state, self.texts.test, [UNSEEN])[UNSEEN]
        options = replace(self.options("rounds"), learning_rate=rate, schedule="linear")
        worker = Worker(self.kind, self.texts.train[UNSEEN], options, self.base, False)
        worker.begin(state)
        worker.work(options.steps, None, False)
        return {"zero-shot": before, "fine-tuned": self.losses(worker.state(), self.texts.test, [UNSEEN])[UNSEEN]}


class Worker:
    """One contributor: a model, what is trained of it, and what it keeps from round to round."""

    def __init__(
        self, kind: str, blocks: Blocks, options: TrainingOptions, base: State, estimates: bool, finished: int = 0
    ) -> None:
        """finished: of the steps of the schedule, when it comes late."""
        self.model: PreTrainedModel = load_whole(starter.MODEL)
        self.kind, self.blocks, self.options, self.base = kind, blocks, options, base
        self.trainee: Trainee = new_trainee(self.model, f"{kind}@1", base, blocks, KindOptions(), options.seed)
        self.run = Run(self.model, self.trainee, blocks, blocks[:0], options, {})
        self.batches = self.run.batches(finished)
        self.own: State | None = None
        self.estimates = estimates
        self.left: dict[str, State] = {}

    def successor(self, number: int, steps: int) -> "Worker":
        """Another contributor with the same kind of data, which knows nothing of the rounds before."""
        options = replace(self.options, seed=self.options.seed + 100 * number)
        return Worker(self.kind, self.blocks, options, self.base, self.estimates, number * steps)

    @torch.no_grad()
    def begin(self, state: State) -> None:
        for name, parameter in self.trainee.parameters.items():
            parameter.copy_(state[name])

    def work(self, steps: int, average: State | None, wants_variate: bool) -> None:
        self.run.correction = {}
        if average is not None and (self.own is not None or self.estimates):
            own = self.own or self.measured_variate()
            self.run.correction = {name: average[name] - own[name] for name in average}
        self.run.sums = None
        if wants_variate:
            self.run.sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self.trainee.parameters.items()}
        with frozen(self.model, self.trainee):
            for _ in range(steps):
                self.run.step(*next(self.batches))

    def measured_variate(self) -> State:
        """The mean gradient of a few steps that are not made."""
        run = Run(self.model, self.trainee, self.blocks, self.blocks[:0], self.options, {})
        sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in run.optimiser.parameters.items()}
        with frozen(self.model, self.trainee):
            for _, batch in islice(run.batches(0), ESTIMATING_STEPS):
                run.gradients(batch)
                for name, gradient in run.optimiser.gradients().items():
                    sums[name] += gradient
                run.optimiser.forget_gradients()
        return {name: (total / ESTIMATING_STEPS).float() for name, total in sums.items()}

    def reset(self) -> None:
        self.run.optimiser = Optimiser(self.trainee.parameters, 0.0, 0.0)

    def state(self) -> State:
        return {name: p.detach().clone() for name, p in self.trainee.parameters.items()}

    def variate(self, steps: int) -> tuple[State, int]:
        """The mean gradient of the round as others read it, and its bytes."""
        assert self.run.sums is not None
        raw, self.left["variate"] = control.write(
            {name: (total / steps).float() for name, total in self.run.sums.items()}, self.left.get("variate")
        )
        self.own = dict(control.read(raw, control.parameters(self.state()), UNBOUNDED))
        return self.own, len(raw)

    def fisher(self, slots: Sequence[Slot]) -> tuple[Mapping[str, Tensor], int]:
        """As others read it, and its bytes: from Adam's second moments, which take no pass of their own."""
        kind, moments = get_kind(f"{self.kind}@1"), self.run.optimiser.second_moments()
        options = replace(self.options, fisher="adam")
        found = fisher_of(self.model, self.trainee, moments, self.blocks, options)
        raw = blob.pack(compact.encode(kind.fisher_of(found)))
        change = kind.read(blob.pack(self.state()), slots, UNBOUNDED)
        return kind.read_fisher(change, raw, UNBOUNDED), len(raw)

    def update(self, parent: State, bits: int, feedback: bool) -> tuple[State, int]:
        """The update as others read it, and its bytes."""
        delta = {name: p.detach() - parent[name] for name, p in self.trainee.parameters.items()}
        if bits == 32:
            return delta, len(blob.pack(delta))
        encode = four_bits if bits == 4 else one_bit
        read, self.left["update"], size = encode(delta, self.left.get("update") if feedback else None)
        return read, size


def four_bits(delta: State, error: State | None) -> tuple[State, State, int]:
    encoded, left = fourbit.encode(delta, error)
    raw = blob.pack(encoded)
    places = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(delta.items()))
    return dict(fourbit.Decoded(raw, places, UNBOUNDED)), left, len(raw)


def one_bit(delta: State, error: State | None) -> tuple[State, State, int]:
    """Signs, and the mean size of each block of 64 in half precision (Seide et al., 2014)."""
    flat, places = end_to_end(delta)
    if error is not None:
        flat = flat + end_to_end(error)[0]
    sizes = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64).abs().mean(1)
    unit = sizes.amax().clamp(min=torch.finfo(torch.float32).tiny)
    scales = ((sizes / unit).half().float() * unit).repeat_interleave(64)[: len(flat)]
    read = torch.where(flat >= 0, scales, -scales)
    return dict(Flat(read, places)), dict(Flat(flat - read, places)), len(flat) // 8 + 2 * len(sizes)


SECTIONS = ("rounds", "bits", "choices", "network", "transfer")
BASE, POOLED, PARALLEL = Arm("base"), Arm("pooled"), Arm("data parallel")
CONTROLLED = Arm(strategy="fisher@1", variates=True)
FOUR_BITS = Arm(variates=True, bits=4)


def arms_of(section: str, counts: Sequence[int]) -> list[Arm]:
    """counts: of rounds."""
    if section == "tune":
        return [POOLED, PARALLEL, Arm(variates=True)]
    if section == "rounds":
        found = [BASE, POOLED, PARALLEL]
        found += [Arm(rounds=1, strategy=strategy, alpha=0.0) for strategy in ("mean@1", "fisher@1")]
        for rounds in counts:
            found += [
                Arm(rounds=rounds),
                Arm(rounds=rounds, strategy="fisher@1"),
                replace(CONTROLLED, rounds=rounds),
                replace(FOUR_BITS, rounds=rounds),
            ]
        found += [replace(FOUR_BITS, rounds=rounds, bits=1, feedback=True) for rounds in counts[::2]]
        return found
    if section == "bits":
        rules = [Arm(), Arm(strategy="fisher@1"), Arm(variates=True), CONTROLLED]
        return [BASE, POOLED, PARALLEL, *(replace(a, bits=b, feedback=b == 1) for b in (32, 4, 1) for a in rules)]
    if section == "choices":
        found = [Arm(variates=True), replace(FOUR_BITS, feedback=True), replace(CONTROLLED, bits=4)]
        found += [Arm(bits=4), Arm(keep=False), Arm(momentum=0.3), Arm(variates=True, momentum=0.3), Arm(alpha=1.25)]
        return [BASE, POOLED, PARALLEL, Arm(), FOUR_BITS, *found]
    if section == "network":
        found = [BASE, POOLED, PARALLEL, FOUR_BITS]
        found += [replace(FOUR_BITS, churn=True), replace(FOUR_BITS, late=True), replace(FOUR_BITS, unequal=True)]
        found += [replace(FOUR_BITS, churn=True, estimates=True), replace(FOUR_BITS, late=True, estimates=True)]
        found += [Arm(bits=4, churn=True), Arm(bits=4, late=True), Arm(bits=4, unequal=True)]
        found += [replace(FOUR_BITS, exam=True), replace(FOUR_BITS, unequal=True, exam=True)]
        for count in (2, 8, 16):
            found += [replace(PARALLEL, contributors=count), replace(FOUR_BITS, contributors=count)]
        return found
    return [BASE, FOUR_BITS, replace(FOUR_BITS, scale=0.25), replace(FOUR_BITS, general=0.5)]


def done(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(kind: str, seed: int, arm: Arm, section: str, args: argparse.Namespace, rate: float) -> str:
    asked = {"kind": kind, "seed": seed, "arm": asdict(arm), "steps": args.steps, "rows": args.rows}
    return json.dumps(asked | {"sequence": args.sequence, "rate": rate, "transfer": section == "transfer"})


def rates_of(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """By way, the rate that is best on seed 0's tuning half."""
    best: dict[str, float] = {}
    for arm in arms_of("tune", ()):
        found = {}
        for rate in RATES[kind][arm.way]:
            bench = partial(Bench, kind, 0, args, {arm.way: rate})
            line = once(args, kind, 0, arm, "tune", rate, bench)
            found[rate] = mean(line["tune"].values()) if line else float("inf")
        best[arm.way] = min(found, key=lambda rate: found[rate])
    return best


def once(
    args: argparse.Namespace, kind: str, seed: int, arm: Arm, section: str, rate: float, bench: Callable[[], Bench]
) -> dict[str, Any] | None:
    """The outcome of one arm, from the results when it is there; None when it is not, and nothing is to be run."""
    key = key_of(kind, seed, arm, section, args, rate)
    for finished in done(args.results):
        if finished["key"] == key:
            return finished | {"arm": str(arm)}
    if args.table:
        return None
    began, found = time.monotonic(), bench()
    state, sent, curve = found.improved(arm)
    line: dict[str, Any] = {
        "key": key, "kind": kind, "seed": seed, "section": section, "arm": str(arm), "contributors": arm.contributors,
        "tune": found.losses(state, found.texts.tune), "test": found.losses(state, found.texts.test),
        "sent": sent, "curve": curve,
    }  # fmt: skip
    if section == "transfer":
        line["transfer"] = {f"{factor:g}": found.transfer(state, factor * rate) for factor in (1.0, 0.25)}
    line["seconds"] = time.monotonic() - began
    with args.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    loss = mean(line["test"].values())
    print(f"{kind} {seed} {rate:g} {arm}: {loss:.4f} ({line['seconds']:.0f} s)", file=sys.stderr, flush=True)
    return line


def gains_of(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    """By kind, seed and arm: how far the reported loss is below the base model's."""
    losses = {(line["kind"], line["seed"], line["arm"]): mean(line["test"].values()) for line in lines}
    return {key: losses[key[0], key[1], "base"] - loss for key, loss in losses.items() if (*key[:2], "base") in losses}


def spread(values: Sequence[float], form: str) -> str:
    return f"{mean(values):{form}} ± {pstdev(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def table(kind: str, lines: Sequence[dict[str, Any]]) -> str:
    gains = gains_of(lines)
    rows = [
        "| | loss | gain | of pooled's | of data parallel's | uploaded | of data parallel's | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = {line["seed"]: line for line in lines if line["arm"] == arm}
        seeds = [seed for seed in own if (kind, seed, arm) in gains]
        if not seeds:
            continue
        cells = [
            spread([mean(own[seed]["test"].values()) for seed in seeds], ".4f"),
            spread([gains[kind, seed, arm] for seed in seeds], ".4f"),
        ]
        peers = own[seeds[0]]["contributors"]
        parallel = "data parallel" if peers == 4 else f"data parallel, {peers} contributors"
        for other in ("pooled", parallel):
            shares = [gains[kind, s, arm] / gains[kind, s, other] for s in seeds if gains.get((kind, s, other))]
            cells.append(spread(shares, ".1%") if shares else "")
        sent = mean(own[seed]["sent"] for seed in seeds)
        whole = [line["sent"] for line in lines if line["arm"] == parallel]
        cells += [f"{sent / 1e6:.3f} MB" if sent else "", f"{sent / whole[0]:.2%}" if sent and whole else ""]
        rows.append(f"| {arm} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(rows)


def transfer_table(lines: Sequence[dict[str, Any]]) -> str:
    rows = ["| from | rate | zero-shot | after fine-tuning | seeds |", "|---|---:|---:|---:|---:|"]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line["transfer"] for line in lines if line["arm"] == arm]
        for factor in own[0]:
            cells = [spread([each[factor][what] for each in own], ".4f") for what in ("zero-shot", "fine-tuned")]
            rows.append(f"| {arm} | × {factor} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(rows)


def plot(folder: Path, kind: str, lines: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[tuple[int, float, float]]]] = {}
    for line in lines:
        if line["curve"] and line["contributors"] == 4:
            curves.setdefault(line["arm"], []).append(line["curve"])
    for at, axis in ((0, "rounds"), (1, "bytes")):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for arm, found in curves.items():
            if not arm.startswith(("20 rounds", "5 rounds")):
                continue
            points = [(one[at], mean(each[number][2] for each in found)) for number, one in enumerate(found[0])]
            axes.plot(*zip(*points, strict=True), marker=".", label=arm)
        for flat in ("pooled", "data parallel", "base"):
            own = [mean(line["test"].values()) for line in lines if line["arm"] == flat]
            if own:
                axes.axhline(mean(own), linestyle=":", color="grey")
                axes.annotate(flat, (1.0, mean(own)), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        if at:
            axes.set_xscale("log")
        axes.set_xlabel("rounds" if at == 0 else "bytes that each contributor has uploaded")
        axes.set_ylabel("loss on what is held out, nats per token")
        axes.legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(folder / f"collective-{kind}-{axis}.png", dpi=110)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--section", nargs="+", default=["rounds"], choices=SECTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160, help="of each contributor, in all rounds together")
    parser.add_argument("--rows", type=int, default=2, help="of a step of one contributor")
    parser.add_argument("--sequence", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rounds", type=int, nargs="+", default=[5, 10, 20, 40], help="of the section of that name")
    parser.add_argument("--results", type=Path, default=Path("collective.jsonl"), help="a line for every finished run")
    parser.add_argument("--plots", type=Path, help="folder for the curves by round and by bytes")
    parser.add_argument("--table", action="store_true", help="print what the results have, and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.kind:
        rates = rates_of(kind, args)
        own: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        for seed in args.seeds:
            for section in args.section:
                for arm in arms_of(section, args.rounds):
                    rate = rates[arm.way if arm.way in rates else "rounds"]
                    line = once(args, kind, seed, arm, section, rate, partial(Bench, kind, seed, args, rates))
                    if line is not None and line not in own:
                        (moved if section == "transfer" else own).append(line)
        print(f"\n## {kind}\n\nLearning rates: {', '.join(f'{way} {rate:g}' for way, rate in rates.items())}\n")
        print(table(kind, own))
        if moved:
            print(f"\n### A domain that nobody trained on\n\n{transfer_table(moved)}")
        if args.plots:
            plot(args.plots, kind, own)


if __name__ == "__main__":
    main()
