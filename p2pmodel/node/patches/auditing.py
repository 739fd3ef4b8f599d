"""Whether a patch was trained as it says: some segments of the training done again, from the states it names.

What is compared are digests: the same software on the same kind of processor with as many threads gives the same bits,
and there nothing else will do. Elsewhere the last bits differ, and what counts is how far the two results are apart,
next to how far the segment went.
A state stands for all before it, so a segment binds what it begins in: its adapter has to be the checkpoint of that
step, and the state that it ends in the one that the next segment begins in.
"""

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import short
from p2pmodel.domain.patch import Patch, Provenance
from p2pmodel.engine import data
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.training.auditing import distance, replay_segment, shapes_of
from p2pmodel.engine.training.loop import frozen
from p2pmodel.engine.training.optimising import Optimiser
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.sensitivity import fisher_of
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.machine.processor import processor
from p2pmodel.node.patches.contributing import rounded
from p2pmodel.node.patches.evidence import Find, in_order, verified
from p2pmodel.node.patches.patchbook import OpenedPatch
from p2pmodel.node.patches.replaying import demand_memory, kind_options_of, options_of
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.patch_kind import Fit, Trainee
from p2pmodel.wire import canonical

CLOSE, CLOSE_IN_BF16 = 0.005, 0.25
"""Of a segment's own length: as far as other rounding takes two runs apart; another learning rate or text takes them
farther. Other vector instructions made up to 5e-6 of it in float32; in bfloat16 up to 0.08, in Adam's first steps,
where the sign of a gradient counts and not its size."""
ROUNDED_OTHERWISE = "The patch's adapter is not its checkpoint in four bits a value."
NOT_ROUNDED_HERE = "Whether the adapter is its checkpoint in four bits cannot be told: the checkpoint is not to be had."
SAME, NEAR, OTHER, MISSING = "same", "close", "differs", "missing"


@dataclass(frozen=True)
class Segment:
    """verdict: `same` bits, `close`, `differs`, or `missing` where the states are not to be had. apart: see
    `engine.training.auditing.distance`."""

    first_step: int
    last_step: int
    verdict: str
    apart: float


@dataclass(frozen=True)
class Audit:
    """problems: a sentence each; none means that all that was looked at is as the patch says; gaps: what could not be
    looked at. segments: those that were
    replayed, of so many; seed: that they were drawn by. comparable: whether software, threads and processor are the
    training's, so that its bits are expected.
    steps: that were done again, of so many; fisher: as a segment's verdict, or empty where it could not be made."""

    segments: tuple[Segment, ...]
    of: int
    seed: int
    steps: int
    of_steps: int
    comparable: bool
    fisher: str
    seconds: float
    problems: tuple[str, ...]
    gaps: tuple[str, ...]


def audit(
    opened: OpenedPatch, base: Path, files: Sequence[Path], find: Find, *, segments: int = 2, seed: int | None = None
) -> Audit:
    """files: what it was trained on, in any order; find: brings what states and checkpoints the patch names. seed: None
    for one that nobody can have known.

    Raises InvalidInput for data that are not the patch's, NotFound for a patch that names no states."""
    patch, began = opened.patch, time.monotonic()
    provenance = patch.provenance
    if not provenance.replayable:
        raise NotFound(
            f"Patch {short(opened.id)} names no states of its training, so nothing of it can be done again.",
            "Patches that were imported, or moved by a rebase, have none.",
        )
    drawn = random.SystemRandom().getrandbits(31) if seed is None else seed
    total = len(provenance.states) - 1
    chosen = sorted(random.Random(drawn).sample(range(total), min(segments, total)))
    comparable = _same_software(provenance.software) and provenance.threads <= _cores()
    problems: list[str] = []
    gaps: list[str] = []
    if patch.checkpoint not in provenance.checkpoints:
        problems.append("The patch's adapter is none of the checkpoints that it names.")
    if total > -(-provenance.recipe.steps // provenance.checkpoint_every):
        # Of those after the last step each is the same as the one before, whatever led there.
        problems.append(f"The patch names {total + 1} states, and its training has no steps for so many.")
    with _computing_alike(provenance.threads), _Scene.open(opened, base, files) as scene:
        if not scene.begins_as_said(find):
            problems.append("The training did not begin with the values of the patch's parent.")
        if (other := scene.rounded_otherwise(verified(find))) is not None:
            (problems if other else gaps).append(ROUNDED_OTHERWISE if other else NOT_ROUNDED_HERE)
        done = [_replay(scene, at, verified(find), comparable) for at in chosen]
        fisher = _fisher(scene, opened, verified(find), comparable)
    for segment in done:
        where = f"Steps {segment.first_step} to {segment.last_step}"
        if segment.verdict == OTHER:
            problems.append(f"{where} lead somewhere else, {segment.apart:.1%} of their way off.")
        elif segment.verdict == MISSING:
            gaps.append(f"{where} cannot be replayed: their states are not to be had.")
    if fisher == OTHER:
        problems.append("The patch's Fisher is not that of its data.")
    steps = sum(segment.last_step - segment.first_step for segment in done if segment.verdict != MISSING)
    return Audit(
        tuple(done),
        total,
        drawn,
        steps,
        provenance.step_of(total),
        comparable,
        fisher,
        time.monotonic() - began,
        tuple(problems),
        tuple(gaps),
    )


@dataclass(frozen=True)
class _Scene:
    """All as it was when the training began."""

    patch: Patch
    model: PreTrainedModel
    trainee: Trainee
    parts: data.Parts
    options: TrainingOptions
    state: Mapping[str, Tensor]
    start: bytes

    @classmethod
    @contextmanager
    def open(cls, opened: OpenedPatch, base: Path, files: Sequence[Path]) -> Iterator["_Scene"]:
        patch, options = opened.patch, options_of(opened.patch, read_checkpoint(base).context)
        kind_options = kind_options_of(opened)
        tokenizer = load_tokenizer(base)
        corpus = data.load(in_order(patch.provenance.data, files), tokenizer, skip_broken=True)
        held_out = patch.provenance.validation
        validation = data.load(in_order(held_out, files), tokenizer, skip_broken=True) if held_out else None
        parts = data.split(
            corpus,
            sequence=options.sequence,
            seed=options.seed,
            share=options.validation,
            packing=options.packing,
            validation=validation,
        )
        model, state = load_whole(base), version_state(opened.lineage, patch.parent)
        demand_memory(options, parts.train, model)
        trainee = new_trainee(model, patch.kind, state, parts.train, kind_options, options.seed)
        try:
            yield cls(patch, model, trainee, parts, options, state, blob.pack(trainee.adapter()))
        finally:
            trainee.remove()

    def rounded_otherwise(self, find: Find) -> bool | None:
        """Whether the adapter is not what its checkpoint gives in four bits a value; False where that cannot be said,
        None where there is nothing to say."""
        if self.patch.provenance.chosen is None:
            return None
        raw = find(self.patch.checkpoint)
        if raw is None:
            return False
        try:
            values = blob.unpack(raw, None, len(raw))
            if get_kind(self.patch.kind).fit is not Fit.SLOTS or shapes_of(values) != shapes_of(self.trainee.adapter()):
                return True
            given = rounded(self.patch.kind, values, self.state)
        except (Rejected, ValueError):  # the latter for what is too far from the parent to be said in four bits
            return True
        return True if canonical.digest(given) != self.patch.adapter.digest else None

    def begins_as_said(self, find: Find) -> bool:
        first = self.patch.provenance.checkpoints[0]
        if canonical.digest(self.start) == first:
            return True
        raw = verified(find)(first)
        try:
            return raw is not None and distance(raw, self.start, self.start) == 0
        except Rejected:
            return False


def _replay(scene: _Scene, at: int, find: Find, comparable: bool) -> Segment:
    provenance = scene.patch.provenance
    first, last = provenance.step_of(at), provenance.step_of(at + 1)
    state, claimed = find(provenance.states[at]), find(provenance.checkpoints[at + 1])
    raw = None if provenance.correction is None else find(provenance.correction)
    if state is None or (provenance.correction is not None and raw is None):
        return Segment(first, last, MISSING, float("inf"))
    try:
        correction = None if raw is None else blob.unpack(raw, None, len(raw))
        found = replay_segment(
            scene.model, scene.trainee, scene.parts.train, scene.options, state, range(first, last), correction
        )
    except (InvalidInput, Rejected):
        return Segment(first, last, OTHER, float("inf"))
    if canonical.digest(found.before) != provenance.checkpoints[at]:
        return Segment(first, last, OTHER, float("inf"))
    if (canonical.digest(found.after), canonical.digest(found.state)) == (
        provenance.checkpoints[at + 1],
        provenance.states[at + 1],
    ):
        return Segment(first, last, SAME, 0.0)
    next_state = find(provenance.states[at + 1])
    if claimed is None or next_state is None:
        return Segment(first, last, OTHER if comparable else MISSING, float("inf"))
    try:
        apart = max(distance(claimed, found.after, found.before), distance(next_state, found.state, state))
    except Rejected:
        apart = float("inf")
    return Segment(first, last, NEAR if not comparable and apart <= _limit(provenance) else OTHER, apart)


def _limit(provenance: Provenance) -> float:
    rounded = provenance.recipe.precision == "bf16" or dict(provenance.software).get("swarm", "fp32") != "fp32"
    return CLOSE_IN_BF16 if rounded else CLOSE


def _fisher(scene: _Scene, opened: OpenedPatch, find: Find, comparable: bool) -> str:
    """Made again at the checkpoint that the adapter is."""
    patch, provenance = scene.patch, scene.patch.provenance
    if patch.checkpoint not in provenance.checkpoints or not opened.fisher:
        return ""
    state = find(provenance.states[provenance.checkpoints.index(patch.checkpoint)])
    last = find(provenance.states[-1])
    if state is None or last is None:
        return ""
    options, kind = scene.options, get_kind(patch.kind)
    with frozen(scene.model, scene.trainee):
        optimiser = Optimiser(scene.trainee.parameters, 0.0, 0.0)
        try:
            optimiser.load(last)
            moments = optimiser.second_moments()
            optimiser.load(state, moments=False)
            with torch.autocast(scene.model.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                found = fisher_of(scene.model, scene.trainee, moments, scene.parts.train, options)
        except InvalidInput:
            return OTHER
    raw = blob.pack(compact.encode(kind.fisher_of(found) if options.fisher == "adam" else found))
    if canonical.digest(raw) == patch.fisher.digest:
        return SAME
    if comparable:
        return OTHER
    places = tuple((name, tuple(t.shape)) for name, t in sorted(found.items()))
    try:
        both = [compact.Decoded(each, places, max(len(raw), len(opened.fisher))) for each in (raw, opened.fisher)]
    except Rejected:
        return OTHER
    apart = sum(float((both[0][name] - both[1][name]).abs().sum()) for name, _ in places)
    whole = sum(float(both[0][name].sum()) for name, _ in places)
    return NEAR if apart <= 0.1 * whole else OTHER  # codes are 9 % apart


def _same_software(wanted: Sequence[tuple[str, str]]) -> bool:
    """And the same processor; what the swarm computed, nobody computes to the bit."""
    places = dict(wanted)
    if places.pop("cpu", None) != processor():
        return False
    try:
        return all(installed(name) == version for name, version in places.items())
    except (PackageNotFoundError, ValueError):  # which an empty name is
        return False


def _cores() -> int:
    return os.cpu_count() or 1


@contextmanager
def _computing_alike(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, _cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
