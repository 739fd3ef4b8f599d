"""`p2pmodel rebase`: a patch moves to another version, of its own lineage or of one with another base."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2pmodel import __version__
from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.modular import KIND
from p2pmodel.domain.patch import Patch
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.data import read_texts
from p2pmodel.engine.evaluation import evaluate
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_change, read_change, read_masses, version_state
from p2pmodel.node.patches.patchbook import OpenedPatch
from p2pmodel.store import patchfile
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.changes import NOT_HELD, Change
from p2pmodel.tensors.kinds import Kinds, get_kind
from p2pmodel.tensors.rebase import moved
from p2pmodel.wire import canonical

REBASED = "rebased"
"""In a recipe: nothing was trained."""


@dataclass(frozen=True)
class Losses:
    """Nats per byte on the user's own text: of the old version with the patch, of the new one, and of the new one with
    the rebased patch."""

    before: float
    version: float
    rebased: float
    bytes: int


@dataclass(frozen=True)
class Rebased:
    """dropped: slots of the patch that the new model does not have in that shape. weighted: by how many merged patches'
    Fishers the version's weight was found; None when some of them are not here, and both sides weighed the same.
    kept: the share of the update that has room in factors of the patch's rank; 1 for other kinds."""

    id: PatchId
    patch: Patch
    size: int
    dropped: tuple[str, ...]
    weighted: int | None
    kept: float
    losses: Losses | None


def rebase(
    opened: OpenedPatch,
    lineage: Lineage,
    version: VersionId,
    output: Path,
    *,
    texts: Sequence[Path] = (),
    bases: tuple[Path, Path] | None = None,
) -> Rebased:
    """lineage, version: where it goes. texts: to compare on, with the folders of the old base and the new one.

    Raises InvalidInput when the version takes no such patches, or has none of its slots; NotFound when values are not
    here."""
    old, patch = opened.lineage, opened.patch
    if patch.kind not in lineage.manifest.kinds:
        raise InvalidInput(
            f"{lineage.manifest.name} takes no patches of kind {patch.kind}.",
            f"It takes {', '.join(lineage.manifest.kinds)}.",
        )
    if not opened.fisher:
        raise NotFound("The patch's Fisher is not here, by which it would be merged.", "Fetch it: p2pmodel join")
    change = read_change(old, patch.kind, opened.adapter)
    masses = read_masses(old, patch.kind, change, opened.fisher)
    parent, state = version_state(old, patch.parent), version_state(lineage, version)
    names = sorted(change.values)
    untouched = dict(state)
    if patch.kind == KIND:
        _make_room(lineage, change, opened.adapter, parent, state)
    same = [name for name in names if name in state and tuple(state[name].shape) == change.shape(name)]
    if not same:
        raise InvalidInput(f"{lineage.manifest.name} has none of the slots that the patch changes.")
    upstream = _between(opened, lineage, version)
    sources = None if upstream is None else [masses_of(lineage, p) for p in upstream]
    updates: dict[str, Tensor] = {}
    for name in same:
        update = change.values[name] if change.relative else change.values[name].double() - parent[name].double()
        shift = state[name].double() - parent[name].double() if old.model == lineage.model else torch.zeros(())
        mass = None if sources is None else mean_mass(sources, name, change.shape(name))
        if name not in untouched:  # of an expert that comes with the patch
            updates[name] = update
            continue
        updates[name] = moved(update, shift.expand(change.shape(name)), masses[name], mass)
    values, kept = get_kind(patch.kind).adapter_of(updates, state, rank=0, like=change)
    raw = blob.pack(values)
    fisher = opened.fisher if same == names else _fisher(opened, change, same)
    recipe = dataclasses.replace(patch.provenance.recipe, optimizer=REBASED, steps=0, continued=False)
    provenance = dataclasses.replace(
        patch.provenance,
        recipe=recipe,
        software=(("p2pmodel", __version__),),
        checkpoints=(),
        states=(),
        correction=None,
    )
    result = read_change(lineage, patch.kind, raw).applied_to(state)
    losses = None
    if texts and bases:
        losses = _compare(opened, change.applied_to(parent), lineage, untouched, result, texts, bases)
    new = dataclasses.replace(
        patch,
        contributor=lineage.home.key.peer,
        model=lineage.model,
        parent=version,
        adapter=canonical.blob_ref(raw),
        fisher=canonical.blob_ref(fisher),
        control=None,
        loss_before=losses.version if losses else 0.0,
        loss_after=losses.rebased if losses else 0.0,
        provenance=provenance,
    )
    patch_id, size = patchfile.write(output, lineage.home.key, new, raw, fisher)
    return Rebased(
        patch_id,
        new,
        size,
        tuple(name for name in names if name not in same),
        None if upstream is None else len(upstream),
        kept,
        losses,
    )


def _make_room(
    lineage: Lineage, change: Change, adapter: bytes, parent: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """A new expert is in neither version: it is moved as it is. Raises InvalidInput where there is another by its name,
    Rejected where the model has no room for it."""
    read_change(lineage, KIND, adapter)
    for name, values in change.values.items():
        nothing = torch.zeros_like(values)
        if parent.setdefault(name, nothing).shape != state.setdefault(name, nothing).shape:
            raise InvalidInput(
                f"{lineage.manifest.name} has an expert of that name with another rank.",
                "Train it again, by another name.",
            )


def _fisher(opened: OpenedPatch, change: Change, slots: Sequence[str]) -> bytes:
    """Of some of the slots."""
    held = compact.Decoded(opened.fisher, change.fisher_places, len(opened.fisher))
    return blob.pack(compact.encode({name: t for name, t in held.items() if name.partition("#")[0] in slots}))


def _between(opened: OpenedPatch, lineage: Lineage, version: VersionId) -> list[Patch] | None:
    """The patches that make the difference between the two versions; of another lineage all that were merged. None
    where it cannot be told how much the version depends on its values: patches are missing, or it came about
    otherwise."""
    chains = lineage.chain(version), lineage.chain(opened.patch.parent)  # the latter is empty in another lineage
    mine, theirs = ({patch for made in chain for patch in made.patches} for chain in chains)
    here = lineage.home.objects.has
    if any(made.restores for chain in chains for made in chain) or not all(
        patch in lineage.patches and all(here(ref.digest) for ref in lineage.patches[patch].blobs)
        for patch in mine | theirs
    ):
        return None
    return [lineage.patches[patch] for patch in sorted(mine ^ theirs)]


def masses_of(lineage: Lineage, patch: Patch) -> Mapping[str, Tensor]:
    """The Fisher of a patch of the home, by slot, see `PatchKind.read_fisher`. Raises NotFound, Rejected."""
    objects, limit = lineage.home.objects, lineage.largest_patch
    return read_masses(lineage, patch.kind, patch_change(lineage, patch), objects.load(patch.fisher.digest, limit))


def mean_mass(sources: Sequence[Mapping[str, Tensor]], slot: str, shape: tuple[int, ...]) -> Tensor:
    """Of a slot's Fisher over all patches, float64; what one does not hold counts as nothing."""
    total = torch.zeros(shape, dtype=torch.float64)
    for masses in sources:
        if slot in masses:
            mass = masses[slot]
            total += torch.where(mass == NOT_HELD, 0.0, mass).double()
    return total / max(1, len(sources))


def _compare(
    opened: OpenedPatch,
    pair: Mapping[str, Tensor],
    lineage: Lineage,
    state: Mapping[str, Tensor],
    result: Mapping[str, Tensor],
    files: Sequence[Path],
    bases: tuple[Path, Path],
) -> Losses:
    texts = [text.text for text in read_texts(list(files))]
    old, new = load_whole(bases[0]), None
    kinds, tokenizer = Kinds(opened.lineage.manifest.kinds), load_tokenizer(bases[0])
    before = evaluate(old, tokenizer, kinds, pair, texts)
    if bases[0] != bases[1]:
        new, kinds, tokenizer = load_whole(bases[1]), Kinds(lineage.manifest.kinds), load_tokenizer(bases[1])
    alone, rebased = (evaluate(new or old, tokenizer, kinds, each, texts) for each in (state, result))
    return Losses(before.nats_per_byte, alone.nats_per_byte, rebased.nats_per_byte, rebased.bytes)
