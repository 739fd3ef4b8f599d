"""Training a patch on one's own data."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel import __version__
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest, PatchId, VersionId
from p2pmodel.domain.patch import DataFile, Patch, Provenance, Recipe
from p2pmodel.engine import data
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.training.loop import OPTIMIZER, Step, Trained, train
from p2pmodel.engine.training.pace import Pace, measure
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.machine.processor import processor
from p2pmodel.node.patches import continuity
from p2pmodel.node.patches.savepoints import Savepoints
from p2pmodel.store import patchfile
from p2pmodel.tensors import blob, compact, control, fourbit
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.patch_kind import Fit, KindOptions, Trainee
from p2pmodel.wire import bundle, canonical


@dataclass(frozen=True)
class Assignment:
    """What is to be trained on what. base: folder of the checkpoint. skip_broken: leave out lines of the data that
    cannot be used. fresh: begin without what the contributor's optimiser learned in earlier rounds. restart: forget how
    far the same training came before. bits: that a value of the adapter takes in the patch: 32, or 4. mean: the mean of
    all contributors' mean gradients in the round before, by parameter, when the parent has one."""

    lineage: Lineage
    base: Path
    parent: VersionId
    kind: str
    files: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    options: TrainingOptions = field(default_factory=TrainingOptions)
    kind_options: KindOptions = field(default_factory=KindOptions)
    licence: str = ""
    skip_broken: bool = False
    fresh: bool = False
    restart: bool = False
    bits: int = 32
    mean: Mapping[str, Tensor] | None = None

    @property
    def options_of_kind(self) -> tuple[tuple[str, float], ...]:
        return tuple((name, float(getattr(self.kind_options, name))) for name in get_kind(self.kind).options)


class Workplace(Protocol):
    """Where the model is that is trained with."""

    @property
    def computes(self) -> tuple[str, str]:
        """On what, for those who audit: (`cpu`, which), or (`swarm`, codec)."""

    def open(
        self, assignment: Assignment, state: Mapping[str, Tensor], blocks: data.Blocks
    ) -> AbstractContextManager[tuple[PreTrainedModel, Trainee]]:
        """The model, and what is trained of it, from the `state` of the parent's slots on; `blocks` are the training's.
        Raises InvalidInput for a kind that cannot be trained there."""


class Alone:
    """The whole model, in this process."""

    @property
    def computes(self) -> tuple[str, str]:
        return "cpu", processor()

    @contextmanager
    def open(
        self, assignment: Assignment, state: Mapping[str, Tensor], blocks: data.Blocks
    ) -> Iterator[tuple[PreTrainedModel, Trainee]]:
        options = assignment.options
        model = load_whole(assignment.base)
        trainee = new_trainee(model, assignment.kind, state, blocks, assignment.kind_options, options.seed)
        try:
            yield model, trainee
        finally:
            trainee.remove()


ALONE = Alone()


@dataclass(frozen=True)
class NewPatch:
    """A trained and signed patch: `size` bytes in a file. skipped: lines of the data that were left out."""

    id: PatchId
    patch: Patch
    trained: Trained
    size: int
    skipped: int


@dataclass(frozen=True)
class Estimate:
    """Of a training that was not done. blocks, held_out: how many; tokens: that are learned from in one epoch; bytes:
    of the patch file, unless the training stops early. seconds: of the whole training, about. resumes: steps that an
    earlier process has done."""

    examples: int
    skipped: int
    blocks: int
    held_out: int
    tokens: int
    epochs: float
    values: int
    bytes: int
    seconds: float
    tokens_per_second: float
    resumes: int


@dataclass(frozen=True)
class _Ready:
    """All that a training needs. state: of the parent's slots. software: and what computes; layout: of the trainee's
    parameters; key: of all that the patch depends on."""

    assignment: Assignment
    state: Mapping[str, Tensor]
    model: PreTrainedModel
    trainee: Trainee
    parts: data.Parts
    sources: tuple[data.Source, ...]
    validation: tuple[data.Source, ...]
    software: tuple[tuple[str, str], ...]
    layout: str
    past: continuity.Inheritance | None
    correction: dict[str, Tensor] | None
    key: Digest

    @property
    def savepoints(self) -> Savepoints:
        return Savepoints(self.assignment.lineage, self.key)


def train_patch(
    assignment: Assignment, output: Path, on_step: Callable[[Step], None], workplace: Workplace = ALONE
) -> NewPatch:
    """Reads the data, trains from the parent version's values, signs, and writes the patch file.

    Goes on where the same training was broken off. Raises InvalidInput for data or options that cannot be used,
    NotFound when the parent's values are not here, StorageError.
    """
    with _ready(assignment, workplace) as ready:
        if assignment.restart:
            ready.savepoints.forget()
        trained = train(
            ready.model,
            ready.trainee,
            ready.parts.train,
            ready.parts.held_out,
            assignment.options,
            on_step,
            keeper=ready.savepoints,
            moments=ready.past.moments if ready.past else None,
            correction=ready.correction,
        )
        return _written(ready, trained, output)


def estimate(assignment: Assignment, workplace: Workplace = ALONE) -> Estimate:
    """How much there is to do, from a few steps that change nothing. Raises as `train_patch` does."""
    with _ready(assignment, workplace) as ready:
        options, parts = assignment.options, ready.parts
        pace: Pace = measure(ready.model, ready.trainee, parts.train, parts.held_out, options)
        adapter = _adapter_blob(assignment, pace.adapter, ready.state)
        fisher, variate = _fisher_blob(assignment.kind, options, pace.fisher), None
        if options.control:
            nothing = {name: torch.zeros_like(leaf, device="cpu") for name, leaf in ready.trainee.parameters.items()}
            variate = control.write(nothing)[0]
        unknown = (canonical.digest(b""),) * (1 + -(-options.steps // options.checkpoint_every))
        chosen = unknown[0] if assignment.bits == 4 else None
        samples = options.steps * options.batch * options.accumulate
        patch = _patch(ready, (adapter, fisher, variate), samples, (0.0, 0.0), (unknown, unknown), chosen)
        begun = ready.savepoints.found()
        return Estimate(
            examples=sum(source.examples for source in ready.sources),
            skipped=sum(source.skipped for source in (*ready.sources, *ready.validation)),
            blocks=len(parts.train),
            held_out=len(parts.held_out),
            tokens=parts.train.tokens,
            epochs=options.steps * options.batch * options.accumulate / len(parts.train),
            values=pace.values,
            bytes=len(bundle.pack(assignment.lineage.home.key.sign("patch", patch), adapter, fisher, variate)),
            seconds=pace.total(options),
            tokens_per_second=pace.tokens / pace.step,
            resumes=begun.step if begun else 0,
        )


@contextmanager
def _ready(assignment: Assignment, workplace: Workplace) -> Iterator[_Ready]:
    options, kind, manifest = assignment.options, get_kind(assignment.kind), assignment.lineage.manifest
    if kind.name not in manifest.kinds:
        raise InvalidInput(
            f"{manifest.name} takes no patches of kind {kind.name}.", f"It takes {', '.join(manifest.kinds)}."
        )
    if options.sequence > (context := read_checkpoint(assignment.base).context):
        raise InvalidInput(
            f"The model reads {context} tokens at a time, not {options.sequence}.", f"Use --sequence {context} or less."
        )
    tokenizer = load_tokenizer(assignment.base)
    load = partial(data.load, tokenizer=tokenizer, skip_broken=assignment.skip_broken)
    if assignment.bits not in (4, 32):
        raise InvalidInput(f"A value of a patch takes 4 or 32 bits, not {assignment.bits}.")
    if assignment.bits == 4 and kind.fit is not Fit.SLOTS:
        raise InvalidInput(f"Patches of kind {kind.name} cannot be rounded to 4 bits a value.", "Use --bits 32.")
    corpus = load(assignment.files)
    validation = load(assignment.validation) if assignment.validation else None
    parts = data.split(
        corpus,
        sequence=options.sequence,
        seed=options.seed,
        share=options.validation,
        packing=options.packing,
        validation=validation,
    )
    state = version_state(assignment.lineage, assignment.parent)
    with workplace.open(assignment, state, parts.train) as (model, trainee):
        adapter = trainee.adapter()
        if options.fisher == "adam":
            kind.fisher_of({name: torch.zeros_like(p, device="cpu") for name, p in trainee.parameters.items()})
        if options.control and not kind.continued:
            raise InvalidInput(f"Patches of kind {kind.name} have no control variate.", "Leave out --control.")
        layout = continuity.layout_of(trainee.parameters, adapter)
        past = (
            None
            if assignment.fresh
            else continuity.inherited(assignment.lineage, assignment.kind, assignment.parent, layout)
        )
        correction = _correction(assignment, past)
        sources, held_out = tuple(corpus.sources), tuple(validation.sources) if validation else ()
        software = tuple(sorted((workplace.computes, *_packages())))
        yield _Ready(
            assignment,
            state,
            model,
            trainee,
            parts,
            sources,
            held_out,
            software,
            layout,
            past,
            correction,
            _key(assignment, sources, held_out, software, past, correction),
        )


def _correction(assignment: Assignment, past: continuity.Inheritance | None) -> dict[str, Tensor] | None:
    """mean(c) - cᵢ; None for a contributor that has no cᵢ of an earlier round: what a few batches say of it is so far
    off that it costs more than the correction gains (scripts/bench/collective.py --section network)."""
    mean, own = assignment.mean, past.control if past else None
    if mean is None or own is None or own.keys() != mean.keys():
        return None
    return {name: mean[name] - own[name] for name in mean}


def _key(
    assignment: Assignment,
    sources: tuple[data.Source, ...],
    validation: tuple[data.Source, ...],
    software: tuple[tuple[str, str], ...],
    past: continuity.Inheritance | None,
    correction: Mapping[str, Tensor] | None,
) -> Digest:
    inputs = {
        "model": assignment.lineage.model,
        "parent": assignment.parent,
        "kind": [assignment.kind, list(assignment.options_of_kind), assignment.kind_options.expert],
        "options": dataclasses.asdict(assignment.options),
        "data": [[s.digest, s.skipped] for s in (*sources, *validation)],
        "held out": len(validation),
        "past": past and past.digest,
        "correction": correction and canonical.digest(blob.pack(correction)),
        "threads": torch.get_num_threads(),
        "software": [list(pair) for pair in software],
    }
    return canonical.digest(canonical.encode(inputs))


def _written(ready: _Ready, trained: Trained, output: Path) -> NewPatch:
    assignment, options, lineage = ready.assignment, ready.assignment.options, ready.assignment.lineage
    if ready.correction is not None:  # for whoever does a part of the training again
        lineage.home.objects.put(blob.pack(ready.correction))
    exact, fisher = blob.pack(trained.adapter), _fisher_blob(assignment.kind, options, trained.fisher)
    adapter = _adapter_blob(assignment, trained.adapter, ready.state)
    variate, left = None, None
    if trained.control is not None:
        variate, left = control.write(trained.control, ready.past.error if ready.past else None)
    patch = _patch(
        ready,
        (adapter, fisher, variate),
        trained.samples,
        (trained.loss_before, trained.loss_after),
        (trained.checkpoints, trained.states),
        None if adapter == exact else canonical.digest(exact),
    )
    patch_id, size = patchfile.write(output, lineage.home.key, patch, adapter, fisher, variate)
    read = None if variate is None else control.read(variate, control.parameters(trained.adapter), len(variate))
    continuity.bequeath(lineage, assignment.kind, assignment.parent, ready.layout, trained.final_state, read, left)
    ready.savepoints.forget(keep=trained.states[-1])
    skipped = sum(source.skipped for source in (*ready.sources, *ready.validation))
    return NewPatch(patch_id, patch, trained, size, skipped)


def _patch(
    ready: _Ready,
    blobs: tuple[bytes, bytes, bytes | None],
    samples: int,
    losses: tuple[float, float],
    kept: tuple[tuple[Digest, ...], tuple[Digest, ...]],
    chosen: Digest | None,
) -> Patch:
    """blobs: adapter, Fisher, and control variate; losses: before and after; kept: digests of the checkpoints, and of
    the states; chosen: see `Provenance`."""
    assignment, options, lineage = ready.assignment, ready.assignment.options, ready.assignment.lineage
    recipe = Recipe(
        optimizer=OPTIMIZER,
        kind_options=assignment.options_of_kind,
        continued=ready.past is not None,
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe) if hasattr(options, f.name)},
    )
    adapter, fisher, variate = blobs
    return Patch(
        contributor=lineage.home.key.peer,
        model=lineage.model,
        parent=assignment.parent,
        kind=assignment.kind,
        adapter=canonical.blob_ref(adapter),
        fisher=canonical.blob_ref(fisher),
        samples=max(1, samples),
        loss_before=losses[0],
        loss_after=losses[1],
        licence=assignment.licence,
        provenance=Provenance(
            data=_data_files(ready.sources, assignment.licence),
            recipe=recipe,
            software=ready.software,
            checkpoint_every=options.checkpoint_every,
            checkpoints=kept[0],
            states=kept[1],
            validation=_data_files(ready.validation, assignment.licence),
            threads=torch.get_num_threads(),
            correction=None if ready.correction is None else canonical.digest(blob.pack(ready.correction)),
            chosen=chosen,
        ),
        control=None if variate is None else canonical.blob_ref(variate),
    )


def _adapter_blob(assignment: Assignment, adapter: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> bytes:
    return rounded(assignment.kind, adapter, parent) if assignment.bits == 4 else blob.pack(adapter)


def rounded(kind: str, adapter: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> bytes:
    """The blob of the updates in four bits a value. adapter: as the kind has it in 32; parent: values by slot."""
    updates = adapter if get_kind(kind).relative else {name: value - parent[name] for name, value in adapter.items()}
    return blob.pack(fourbit.encode(updates)[0])


def _fisher_blob(kind: str, options: TrainingOptions, fisher: Mapping[str, Tensor]) -> bytes:
    return blob.pack(compact.encode(get_kind(kind).fisher_of(fisher) if options.fisher == "adam" else fisher))


def _data_files(sources: tuple[data.Source, ...], licence: str) -> tuple[DataFile, ...]:
    return tuple(DataFile(s.name, s.digest, s.size, s.examples, licence) for s in sources)


def _packages() -> tuple[tuple[str, str], ...]:
    return ("p2pmodel", __version__), *((name, installed(name)) for name in ("torch", "transformers"))
