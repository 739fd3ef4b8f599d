"""Merging patches whose blobs are here: for a round, and for anybody who wants to see what would come of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from p2pmodel.domain import modular
from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId, VersionId, short
from p2pmodel.domain.model import BlobRef, MergeSpec
from p2pmodel.domain.version import Candidate
from p2pmodel.logic.copies import copies
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import mapped, patch_change, read_change, read_masses, version_state
from p2pmodel.tensors import control, experts, variates
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change
from p2pmodel.tensors.merging import Contribution, apply_update, get_strategy, momentum
from p2pmodel.tensors.merging.likeness import Sketches
from p2pmodel.tensors.smear import is_expert
from p2pmodel.tensors.variates import Variate
from p2pmodel.wire.records import version_id


@dataclass(frozen=True)
class Source:
    """A patch, and where its blobs come from when they are wanted: mapped where they are large, so that whoever merges
    them need not hold them. weight: λ."""

    id: PatchId
    kind: str
    adapter: Callable[[], Raw]
    fisher: Callable[[], Raw]
    control: Callable[[], Raw] | None
    weight: float = 1.0

    def change(self, lineage: Lineage) -> Change:
        return read_change(lineage, self.kind, self.adapter())


def stored(lineage: Lineage, patch: PatchId, weight: float = 1.0) -> Source:
    """Of a patch in the home. Raises Rejected("patch") when it is not known here."""
    if patch not in lineage.patches:
        raise Rejected("patch", f"The candidate names patch {short(patch)}, which is not known here.")
    header, limit = lineage.patches[patch], lineage.largest_patch

    def read(ref: BlobRef) -> Callable[[], Raw]:
        return lambda: mapped(lineage.home, ref.digest, limit)

    variate = None if header.control is None else read(header.control)
    return Source(patch, header.kind, read(header.adapter), read(header.fisher), variate, weight)


@dataclass(frozen=True)
class Merged:
    """What patches make of their parent. update: δ̄ by slot, float64, of the slots that all versions have; placed: the
    values of the experts that patches hold, whatever α is."""

    parent: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    placed: Mapping[str, Tensor]

    def at(self, alpha: float) -> dict[str, Tensor]:
        """All slots' values. Raises Rejected("finite")."""
        return {**apply_update(self.parent, self.update, alpha), **self.placed}


def merge(
    lineage: Lineage, version: VersionId, parent: Mapping[str, Tensor], sources: Sequence[Source], spec: MergeSpec
) -> Merged:
    """version: with the values `parent`; sources: sorted by id. Raises Rejected, NotFound."""
    shared = [source for source in sources if source.kind != modular.KIND]
    own = [source for source in sources if source.kind == modular.KIND and source.weight]
    update: Mapping[str, Tensor] = {}
    if shared:
        update = _going_on(lineage, version, combine(lineage, _shared(parent), shared, spec), len(shared), spec)
    placed = experts.merge(parent, list(_contributions(lineage, own)))
    return Merged(parent, update, placed)


def copied_among(lineage: Lineage, parent: Mapping[str, Tensor], patches: Sequence[PatchId]) -> dict[PatchId, PatchId]:
    """patches: of the home, the first seen first -> by each copy, what it is a copy of. Experts are not compared."""
    comparable = without_experts(lineage, patches)
    changes = ((patch, patch_change(lineage, lineage.patches[patch])) for patch in comparable)
    return copies(comparable, sketches(parent, changes if len(comparable) > 1 else ()).cosines)


def without_experts(lineage: Lineage, patches: Sequence[PatchId]) -> list[PatchId]:
    """Those of the patches, of the home, that can be copies of each other."""
    return [patch for patch in patches if lineage.patches[patch].kind != modular.KIND]


def sketches(parent: Mapping[str, Tensor], changes: Iterable[tuple[PatchId, Change]]) -> Sketches:
    """changes: of patches that are no experts, all on the parent. Raises Rejected."""
    return Sketches(_shared(parent), changes)


def _shared(parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The slots that all versions have."""
    return {name: tensor for name, tensor in parent.items() if not is_expert(name)}


def combine(
    lineage: Lineage, parent: Mapping[str, Tensor], sources: Sequence[Source], spec: MergeSpec
) -> dict[str, Tensor]:
    """δ̄ by slot, float64, of kinds that change slots of the parent, without momentum. sources: sorted by id. Raises
    Rejected, NotFound."""
    return get_strategy(spec.strategy).combine(parent, list(_contributions(lineage, sources)), spec.of_strategy)


def _going_on(
    lineage: Lineage, version: VersionId, update: Mapping[str, Tensor], patches: int, spec: MergeSpec
) -> Mapping[str, Tensor]:
    """δ̄ of so many patches on the version, with the momentum of the versions before, where there is to be any."""
    if not spec.momentum:
        return update
    unit = get_strategy(spec.strategy).unit(patches)
    moving = momentum.velocity(_steps(lineage, version), spec.momentum)
    return momentum.accelerated(update, {name: v / unit for name, v in moving.items()}, spec.momentum)


def _steps(lineage: Lineage, version: VersionId) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor], float]]:
    """What merges made of the versions up to this one, the oldest of `momentum.REACH` first: back to the base, or to
    where people went back to an older version."""
    made: list[Candidate] = []
    for candidate in reversed(lineage.chain(version)):
        if candidate.restores or len(made) == momentum.REACH:
            break
        if candidate.patches:  # else it has the values of its parent
            made.append(candidate)
    before: Mapping[str, Tensor] = {}
    for candidate in reversed(made):
        unit = get_strategy(candidate.merge.strategy).unit(len(candidate.patches))
        before, after = (
            before or _shared(version_state(lineage, candidate.parent)),
            version_state(lineage, version_id(candidate)),
        )
        yield before, after, candidate.alpha / unit
        before = _shared(after)  # and of all that merged nothing since


def _contributions(lineage: Lineage, sources: Sequence[Source]) -> Iterator[Contribution]:
    for source in sources:
        change = source.change(lineage)
        masses = read_masses(lineage, source.kind, change, source.fisher())
        yield Contribution(source.id, change.values, masses, source.weight, change.relative)


def mean_control(lineage: Lineage, sources: Sequence[Source]) -> bytes | None:
    """The blob of the round's mean control variate; None where no patch has one that counts. Raises Rejected."""
    limit = lineage.largest_patch

    def given() -> Iterator[Variate]:
        for source in sources:
            if source.control is not None and variates.has_mean(source.kind):
                adapter = source.adapter()
                places = control.places(adapter, read_change(lineage, source.kind, adapter), limit)
                gradient = control.read(source.control(), places, limit)
                yield Variate(source.id, source.kind, gradient, source.weight)

    return variates.write_mean(list(given()), lineage.manifest.kinds, lineage.manifest.slots)
