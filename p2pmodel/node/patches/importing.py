"""Adapters that were trained with peft, as signed patches of this contributor."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2pmodel import __version__
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.patch import DataFile, Patch, Provenance, Recipe
from p2pmodel.engine import data
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.interchange import adapters
from p2pmodel.engine.interchange.measuring import Measured, measure
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages import hub
from p2pmodel.node.lineages.bases import is_base_of
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import read_change, version_state
from p2pmodel.node.patches.exporting import marked_version, skeleton
from p2pmodel.store import patchfile
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.changes import Change
from p2pmodel.wire import canonical

IMPORTED, FLAT = "imported", "flat"
"""In a recipe: who the optimiser was, and a Fisher that says the same of all values."""


@dataclass(frozen=True)
class ImportedPatch:
    """fisher: `data`, or `flat` where there were none to measure it with. size: bytes of the file."""

    id: PatchId
    patch: Patch
    fisher: str
    size: int


def import_adapter(
    lineage: Lineage,
    base: Path,
    folder: Path,
    output: Path,
    *,
    version: VersionId | None = None,
    files: tuple[Path, ...] = (),
    assume_base: bool = False,
    licence: str = "",
) -> ImportedPatch:
    """Reads what peft wrote, and writes a patch file. version: that the adapter was trained on, None for what its
    settings name; files: that it was trained on, or alike. assume_base: it is that version, whatever the settings call
    it. Raises InvalidInput, in one sentence, for an adapter that is of another base, or cannot be a patch."""
    adapter = adapters.read(folder, lineage.manifest.limits.max_patch_bytes)
    if adapter.kind not in lineage.manifest.kinds:
        raise InvalidInput(
            f"{lineage.manifest.name} takes no patches of kind {adapter.kind}, which this adapter would be.",
            f"It takes {', '.join(lineage.manifest.kinds)}.",
        )
    parent = _parent(lineage, adapter.base, version, assume_base)
    state = version_state(lineage, parent)
    checkpoint = read_checkpoint(base)
    model = skeleton(checkpoint)
    if adapter.kind == "ia3@1":
        values = adapters.vectors_of(adapter, model, state)
    else:
        values = adapters.through_vectors(adapters.factors_of(adapter, model), model, state, back=True)
    raw = blob.pack(values)
    change = read_change(lineage, adapter.kind, raw)
    options = TrainingOptions(sequence=min(TrainingOptions.sequence, checkpoint.context))
    sources: tuple[data.Source, ...] = ()
    measured = Measured({name: torch.ones(shape) for name, shape in change.fisher_places}, 0.0, 0.0)
    if files:
        sources, measured = _measured(base, adapter.kind, state, values, change, files, options)
    fisher = blob.pack(compact.encode(measured.fisher))
    how = options.fisher if files else FLAT
    recipe = Recipe(
        optimizer=IMPORTED,
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe) if hasattr(options, f.name)}
        | {"steps": 0, "learning_rate": 0.0, "fisher": how},
    )
    patch = Patch(
        contributor=lineage.home.key.peer,
        model=lineage.model,
        parent=parent,
        kind=adapter.kind,
        adapter=canonical.blob_ref(raw),
        fisher=canonical.blob_ref(fisher),
        samples=max(1, sum(source.examples for source in sources)),
        loss_before=measured.loss_before,
        loss_after=measured.loss_after,
        licence=licence,
        provenance=Provenance(
            data=tuple(DataFile(s.name, s.digest, s.size, s.examples, licence) for s in sources),
            recipe=recipe,
            software=(("p2pmodel", __version__),),
            checkpoint_every=1,
            checkpoints=(),
        ),
    )
    patch_id, size = patchfile.write(output, lineage.home.key, patch, raw, fisher)
    return ImportedPatch(patch_id, patch, how, size)


def _parent(lineage: Lineage, named: str, version: VersionId | None, assume_base: bool) -> VersionId:
    """Which version the adapter was trained on, as far as its settings can tell."""
    source = hub.Source.parse(lineage.manifest.source)
    folder = Path(named) if named else None
    marked = marked_version(folder, lineage) if folder and folder.is_dir() else None
    is_base = bool(named) and (
        (source is not None and named == source.repository)
        or (folder is not None and folder.is_dir() and is_base_of(folder, lineage.manifest))
    )
    neutral = lineage.result(lineage.model) is None  # as it is not at the base version of a branch
    found = marked or (VersionId(lineage.model) if is_base and neutral else None)
    if assume_base:
        return version or found or VersionId(lineage.model)
    if found is None or version not in (None, found):
        wanted = lineage.manifest.name if version is None else f"{lineage.manifest.name} {lineage.number(version)}"
        raise InvalidInput(
            f"The adapter names {named[:96]!r} as its base, and nothing shows that this is {wanted}.",
            "If you know that it is, say --assume-base.",
        )
    return found


def _measured(
    base: Path,
    kind: str,
    state: dict[str, Tensor],
    values: dict[str, Tensor],
    change: Change,
    files: tuple[Path, ...],
    options: TrainingOptions,
) -> tuple[tuple[data.Source, ...], Measured]:
    corpus = data.load(files, load_tokenizer(base))
    parts = data.split(corpus, sequence=options.sequence, seed=options.seed)
    found = measure(load_whole(base), kind, state, values, change.fisher_places, parts, options)
    return tuple(corpus.sources), found
