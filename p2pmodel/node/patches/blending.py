"""Merging patches by hand, outside of any round: what comes out is a patch again, to be shown, examined or exported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as installed
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from p2pmodel import __version__
from p2pmodel.domain import modular
from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected, UsageError
from p2pmodel.domain.ids import PatchId, VersionId, abbreviates
from p2pmodel.domain.model import MergeSpec
from p2pmodel.domain.patch import MAX_FILES, DataFile, Patch, Provenance, Recipe
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.exams import Examiner, Suite, search_alpha
from p2pmodel.logic.judgement import mean, objective
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.node.lineages.merging import Source, combine, stored
from p2pmodel.node.lineages.states import read_masses, version_state
from p2pmodel.store import patchfile
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.kinds import BUILT_IN, Kinds, get_kind
from p2pmodel.tensors.merging import apply_update, get_strategy
from p2pmodel.tensors.patch_kind import Fit, PatchKind
from p2pmodel.wire import canonical
from p2pmodel.wire.bundle import OpenBundle

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Influence:
    """How far a slot would lie from where it is, had the patch not taken part: the Euclidean distance of the values."""

    patch: PatchId
    slot: str
    distance: float


@dataclass(frozen=True)
class Blend:
    """A merged patch in a file. weights: λ by patch. tuned: the mean loss in nats per byte on the exam's tuning split,
    of the parent and of the merge, where α was found there. influences: the greatest first, when asked for."""

    id: PatchId
    kind: str
    parent: str
    alpha: float
    weights: Mapping[PatchId, float]
    bytes: int
    tuned: tuple[float, float] | None
    influences: tuple[Influence, ...]


def blend(
    home: Home,
    texts: Sequence[str],
    output: Path,
    spec: MergeSpec | None,
    weights: Mapping[str, float],
    alpha: float | None,
    base: Path | None,
    explain: bool,
) -> Blend:
    """Merges patches, files or ids, of one parent. spec: None for the model's own strategy; weights: λ by what is in
    `texts`; alpha: None to find it on the exam's tuning split, which takes the checkpoint.

    Raises UsageError, NotFound, Rejected, InvalidInput when they have no parent or no slots in common.
    """
    if alpha is not None and not isfinite(alpha):
        raise UsageError(f"A merge can't have the scale {alpha}.", "Give --alpha a number, or leave it out.")
    if unknown := sorted(weights.keys() - set(texts)):
        raise UsageError(f"--lambda names {unknown[0][:64]!r}, which is none of the patches.", "Write it as PATCH=0.5.")
    lineage, opened = _read(home, texts)
    sources = sorted(
        (replace(source, weight=weights.get(text, 1.0)) for text, (_, source) in zip(texts, opened, strict=True)),
        key=lambda source: source.id,
    )
    headers = [patch for patch, _ in opened]
    if len({source.id for source in sources}) != len(sources):
        raise InvalidInput("The same patch is named twice.")
    if len({patch.parent for patch in headers}) > 1:
        raise InvalidInput("The patches have different parents.", "Only patches on one version can be merged.")
    if len({get_kind(source.kind).prefix for source in sources}) > 1:
        raise InvalidInput("Vectors and weights do not fit into one patch.", "Merge patches of kinds that share slots.")
    if any(source.kind == modular.KIND for source in sources):
        raise InvalidInput("Modular experts stay apart in one patch each.", "Publish them all: a round takes them in.")
    chosen = spec or lineage.manifest.merge
    parent = headers[0].parent
    before = version_state(lineage, parent)
    update = combine(lineage, before, sources, chosen)
    tuned: tuple[float, float] | None = None
    if alpha is None:
        alpha, tuned = _tune(lineage, home, base, before, update, get_strategy(chosen.strategy).unit(len(sources)))
    held = sorted({slot for source in sources for slot in source.change(lineage).values})
    kind, masses = _kind(lineage, held[0]), _masses(lineage, sources, before, held)
    adapter: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    for slot in held:
        scaled = update[slot] * alpha
        if not bool(scaled.float().isfinite().all()):
            raise Rejected("finite", f"The merge of slot {slot} is not finite.")
        adapter |= kind.adapter_of({slot: scaled}, before, rank=0)[0]
        fisher |= kind.reduced(slot, masses[slot], scaled)
    blobs = [blob.pack(adapter), blob.pack(compact.encode(fisher))]
    options = {**dict(chosen.parameters), "alpha": alpha}
    patch = merged_header(lineage, parent, headers, kind.name, chosen.strategy, options, blobs)
    patch_id, size = patchfile.write(output, home.key, patch, *blobs)
    return Blend(
        patch_id,
        kind.name,
        str(lineage.number(patch.parent)),
        alpha,
        {source.id: source.weight for source in sources},
        size,
        tuned,
        _influences(lineage, before, sources, chosen, update, alpha) if explain else (),
    )


def _read(home: Home, texts: Sequence[str]) -> tuple[Lineage, list[tuple[Patch, Source]]]:
    """In the order of `texts`."""
    known = known_lineages(home)
    found: list[tuple[Patch, Source]] = []
    lineage: Lineage | None = None
    for text in texts:
        if Path(text).is_file():
            path = Path(text)
            raw = patchfile.read(path)
            own = next((x for x in known if x.model == raw.patch.model), None)
            source = Source(raw.id, raw.patch.kind, _in_file(path, raw, 0), _in_file(path, raw, 1), None)
            found.append((raw.patch, source))
        else:
            own = next((x for x in known if any(abbreviates(text, p) for p in x.patches)), None)
            if own is not None:
                patch = own.find_patch(text)
                found.append((own.patches[patch], stored(own, patch)))
        if own is None:
            raise NotFound(f"{text[:64]!r} is no patch of a model that is known here.", "See: p2pmodel patch list")
        if lineage is not None and own.model != lineage.model:
            raise InvalidInput("The patches are of different models.")
        lineage = own
    if lineage is None:
        raise UsageError("There is nothing to merge.", "Name one patch at least.")
    return lineage, found


def _in_file(path: Path, opened: OpenBundle, number: int) -> Callable[[], Raw]:
    """A blob of a patch file, read where it is looked at. Raises Rejected when the file is another one by then."""
    begin, ref = opened.offsets[number], opened.patch.blobs[number]

    def read() -> Raw:
        try:
            raw = blob.mapped(path)[begin : begin + ref.size]
        except OSError as error:
            raise InvalidInput(f"{path} can't be read: {error.strerror}.") from None
        if canonical.digest(raw) != ref.digest:
            raise Rejected("digest", f"{path} was changed while it was read.")
        return raw

    return read


def _tune(
    lineage: Lineage, home: Home, base: Path | None, before: State, update: State, unit: float
) -> tuple[float, tuple[float, float]]:
    manifest = lineage.manifest
    if not home.objects.has(manifest.exam.digest):
        raise NotFound("The model's exam is not on this machine, so no scale can be found.", "Give one with --alpha.")
    suite = Suite.unpack(home.objects.load(manifest.exam.digest), manifest.exam.size)
    folder = find_base(home, lineage, base)
    examiner = Examiner(load_whole(folder), load_tokenizer(folder), Kinds(manifest.kinds), suite)
    parent = examiner.score(before, "tune")
    scores: dict[float, dict[str, float]] = {}

    def objective_at(scale: float) -> float:
        scores[scale] = examiner.score(apply_update(before, update, unit * scale), "tune")
        return objective(parent, scores[scale], manifest.limits, suite.rules)

    best = search_alpha(objective_at)
    return unit * best, (mean(parent), mean(scores[best]))


def _kind(lineage: Lineage, slot: str) -> PatchKind:
    """That can hold whatever becomes of such slots: one that the model takes, where there is any. Raises
    InvalidInput."""
    for names in (lineage.manifest.kinds, BUILT_IN):
        known = [kind for name in names if slot.startswith((kind := get_kind(name)).prefix)]
        best = max(known, key=lambda kind: kind.fit, default=None)
        if best is not None and best.fit >= Fit.ANY:
            return best
    raise InvalidInput("No patch can hold a merge of these.", "Publish them all: a round merges them.")


def _masses(lineage: Lineage, sources: Sequence[Source], before: State, held: Sequence[str]) -> dict[str, Tensor]:
    """The mean of the patches' Fishers by slot, weighted by λ."""
    total = {slot: torch.zeros(before[slot].shape, dtype=torch.float64) for slot in held}
    for source in sources:
        change = source.change(lineage)
        masses = read_masses(lineage, source.kind, change, source.fisher())
        for slot in change.values:
            total[slot] += masses[slot].double().clamp(min=0).view(total[slot].shape) * source.weight
    weight = sum(source.weight for source in sources)
    return {slot: (mass / weight).to(torch.float32) for slot, mass in total.items()}


def merged_header(
    lineage: Lineage,
    parent: VersionId,
    headers: Sequence[Patch],
    kind: str,
    how: str,
    options: Mapping[str, float],
    blobs: Sequence[bytes],
) -> Patch:
    """Of a patch that comes of others: it stands on all data that they stand on, and claims no gain. how, options: what
    the recipe says in place of an optimiser and of a kind's options; blobs: adapter and Fisher."""
    data: dict[tuple[str, str], DataFile] = {(f.digest, f.name): f for p in headers for f in p.provenance.data}
    loss = sum(p.loss_before * p.samples for p in headers) / sum(p.samples for p in headers)
    licence = " AND ".join(sorted({p.licence for p in headers if p.licence}))
    recipe = Recipe(
        seed=0,
        steps=0,
        batch=1,
        sequence=1,
        optimizer=how[:32],
        learning_rate=0.0,
        fisher_examples=1,
        kind_options=tuple(sorted(options.items())),
    )
    adapter, fisher = map(canonical.blob_ref, blobs)
    return Patch(
        contributor=lineage.home.key.peer,
        model=lineage.model,
        parent=parent,
        kind=kind,
        adapter=adapter,
        fisher=fisher,
        samples=sum(p.samples for p in headers),
        loss_before=loss,
        loss_after=loss,
        licence=licence if len(licence) <= 128 else "",
        provenance=Provenance(
            data=tuple(data[key] for key in sorted(data))[:MAX_FILES],
            recipe=recipe,
            software=(("p2pmodel", __version__), ("torch", installed("torch"))),
            checkpoint_every=1,
            checkpoints=(),
        ),
    )


def _influences(
    lineage: Lineage, before: State, sources: Sequence[Source], spec: MergeSpec, update: State, alpha: float
) -> tuple[Influence, ...]:
    found = []
    for left_out in sources:
        rest = [source for source in sources if source is not left_out]
        nothing = not any(source.weight for source in rest)
        without = {} if nothing else combine(lineage, before, rest, spec)
        for slot, own in update.items():
            difference = own if nothing else own - without[slot]
            distance = abs(alpha) * float(difference.norm())
            if distance:
                found.append(Influence(left_out.id, slot, distance))
    return tuple(sorted(found, key=lambda x: (-x.distance, x.slot, x.patch)))
