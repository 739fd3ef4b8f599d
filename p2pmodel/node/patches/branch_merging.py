"""`p2pmodel merge-branches`: what another lineage over the same base has learned since the two parted, as a patch on
this one's head.

Both are models that came of one, so they are merged as such, each weighted by the Fisher of the patches that changed it
(`tensors.rebase`): the patch is what the merge is away from this lineage's head. Who gives it to a round gives the
exams and the maintainers the word, as on any other patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import acos, degrees
from pathlib import Path

import torch
from torch import Tensor

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.ids import PatchId, short
from p2pmodel.domain.patch import Patch
from p2pmodel.logic.admission import check_patch
from p2pmodel.node.lineages.branches import Family, demand_one_base
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.origins import proven_origins, values_at
from p2pmodel.node.lineages.states import patch_change, version_state
from p2pmodel.node.patches.blending import merged_header
from p2pmodel.node.patches.rebasing import masses_of, mean_mass
from p2pmodel.store import patchfile
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.changes import NOT_HELD, Product
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.patch_kind import Fit, PatchKind
from p2pmodel.tensors.rebase import moved

MERGED = "merged branches"
"""In a recipe: nothing was trained."""
MAX_RANK = 64

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class MergedBranch:
    """at: the model and number of the version where the two parted. theirs, own: the patches that were merged since.
    their_norm, own_norm, norm: Euclidean, of what the other lineage and this one have changed since, and of the patch,
    over the patch's slots; angle: between the first two, in degrees, None where one is nothing. dropped: slots that the
    other has changed and this one does not have; left: those that are of another kind than the patch. kept: the share
    of the update that has room in factors; 1 for other kinds."""

    id: PatchId
    patch: Patch
    size: int
    at: tuple[str, str]
    theirs: tuple[PatchId, ...]
    own: tuple[PatchId, ...]
    their_norm: float
    own_norm: float
    norm: float
    angle: float | None
    dropped: tuple[str, ...]
    left: tuple[str, ...]
    kept: float


def merge_branches(mine: Lineage, other: Lineage, output: Path, kind: str | None = None) -> MergedBranch:
    """Writes the patch file. kind: of the patch, None for the one that holds the change best.

    Raises InvalidInput when the two have different bases, nothing has changed, or it does not fit into one patch;
    NotFound when values, patches, or the lineage that both come of are not here."""
    demand_one_base(mine, other)
    family = Family(mine.home)
    parting = family.parting(mine, other)
    if parting is None:
        raise NotFound(
            f"Where {mine.manifest.name} and {other.manifest.name} have parted is not known here.",
            "Bring in the lineage that they come of: p2pmodel join --layers none --model "
            + " or ".join(_elders(family, (mine, other))),
        )
    for lineage in (mine, other):
        proven_origins(family, lineage)
    number, before = values_at(family, parting.at, (mine, other))
    own, theirs = (version_state(lineage, lineage.head) for lineage in (mine, other))
    changed = [name for name in sorted(theirs) if name not in before or not torch.equal(theirs[name], before[name])]
    fitting = [name for name in changed if all(_shape(state, name) == _shape(theirs, name) for state in (before, own))]
    if changed and not fitting:
        raise InvalidInput(f"{mine.manifest.name} has none of the slots that {other.manifest.name} has changed.")
    if all(torch.equal(theirs[name], own[name]) for name in fitting):
        since = f"since {family.name(parting.at.model)} {number}"
        raise InvalidInput(f"{other.manifest.name} has changed nothing {since} that {mine.manifest.name} has not.")
    their_patches, own_patches = (family.between(lineage, parting.at) for lineage in (other, mine))
    chosen = _kind(mine, fitting, kind)
    slots = [name for name in fitting if name.startswith(chosen.prefix)]
    their_masses, own_masses = (
        [masses_of(lineage, lineage.patches[patch]) for lineage, patch in found]
        for found in (their_patches, own_patches)
    )
    updates: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    sums = torch.zeros(4, dtype=torch.float64)
    for name in slots:
        update, shift = (state[name].double() - before[name].double() for state in (theirs, own))
        shape = tuple(update.shape)
        mass, own_mass = mean_mass(their_masses, name, shape), mean_mass(own_masses, name, shape)
        held = (update != 0) | (mass > 0)
        new = moved(update, shift, torch.where(held, mass, NOT_HELD), own_mass)
        sums += torch.stack([(update**2).sum(), (shift**2).sum(), (new**2).sum(), (update * shift).sum()])
        updates[name] = new.float()
        fisher |= chosen.reduced(name, mass.float(), updates[name])
    if not any(bool(update.any()) for update in updates.values()):
        raise InvalidInput(f"What {other.manifest.name} has changed weighs nothing, by the Fishers of its patches.")
    ranks = [_rank(lineage, patch) for lineage, patch in their_patches] if chosen.fit is Fit.PART else []
    adapter, kept = chosen.adapter_of(updates, own, rank=min(MAX_RANK, sum(ranks)))
    raw = [blob.pack(adapter), blob.pack(compact.encode(fisher))]
    headers = [lineage.patches[patch] for lineage, patch in their_patches]
    patch = merged_header(mine, mine.head, headers, chosen.name, MERGED, {}, raw)
    check_patch(patch, mine.manifest, mine.head, (mine.head,), model=mine.model)
    patch_id, size = patchfile.write(output, mine.home.key, patch, *raw)
    their_norm, own_norm, norm = sums[:3].sqrt().tolist()
    return MergedBranch(
        patch_id,
        patch,
        size,
        (family.name(parting.at.model), number),
        tuple(patch for _, patch in their_patches),
        tuple(patch for _, patch in own_patches),
        their_norm,
        own_norm,
        norm,
        _angle(float(sums[3]), their_norm * own_norm),
        tuple(name for name in changed if name not in fitting),
        tuple(name for name in fitting if name not in slots),
        kept,
    )


def _kind(mine: Lineage, slots: Sequence[str], wanted: str | None) -> PatchKind:
    """Raises InvalidInput."""
    taken = mine.manifest.kinds
    known = sorted((get_kind(name) for name in taken), key=lambda kind: -kind.fit)  # the most exact first
    holding = {kind.name: kind for kind in known if kind.fit is not Fit.NONE}
    if wanted is not None:
        if wanted not in holding:
            raise InvalidInput(
                f"{mine.manifest.name} takes no patches of kind {wanted[:32]!r} that hold what was merged.",
                f"It takes {', '.join(taken)}.",
            )
        if not any(name.startswith(holding[wanted].prefix) for name in slots):
            raise InvalidInput(f"Nothing has changed that a patch of kind {wanted} can hold.", "Leave --kind out.")
        return holding[wanted]
    prefixes = {kind.prefix: kind for kind in reversed(holding.values())}
    found = [kind for prefix, kind in prefixes.items() if any(name.startswith(prefix) for name in slots)]
    if len(found) > 1:
        raise InvalidInput(
            "Vectors and weights have changed, which do not fit into one patch.",
            f"Merge them one after the other: --kind {' and --kind '.join(sorted(kind.name for kind in found))}.",
        )
    if not found:
        raise InvalidInput(f"No patch that {mine.manifest.name} takes can hold what has changed.")
    return found[0]


def _rank(lineage: Lineage, patch: PatchId) -> int:
    """The largest rank that a patch's update of a matrix can have."""
    values = patch_change(lineage, lineage.patches[patch]).values
    return values.rank if isinstance(values, Product) else MAX_RANK


def _shape(state: State, name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _angle(product: float, norms: float) -> float | None:
    return degrees(acos(max(-1.0, min(1.0, product / norms)))) if norms else None


def _elders(family: Family, lineages: Sequence[Lineage]) -> list[str]:
    """The beginnings of the ids of those that a lineage comes of, and that are not known here."""
    found = set()
    for lineage in lineages:
        while (origin := lineage.founding.origin) is not None and origin.model in family.lineages:
            lineage = family.lineages[origin.model]
        if origin is not None:
            found.add(short(origin.model))
    return sorted(found)
