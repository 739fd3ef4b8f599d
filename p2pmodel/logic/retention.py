"""Which blobs of a lineage somebody still needs: what a garbage collector may not take."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from p2pmodel.domain.ids import Digest, PatchId, PeerId, VersionId
from p2pmodel.domain.model import Manifest
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.version import Candidate, Version


def needed_blobs(
    founding: Manifest,
    head: VersionId,
    versions: Sequence[Version],
    candidates: Mapping[VersionId, Candidate],
    patches: Mapping[PatchId, Patch],
    recent: Collection[Digest],
    own: PeerId | None = None,
) -> frozenset[Digest]:
    """founding: the first Manifest; versions: every one that was ever adopted, those of abandoned branches too; recent:
    ids of patches and versions that may still matter, however they are going; own: whose patches are kept with all that
    an audit wants.

    Of versions: the values, the mean of the control variates, the exams that amendments brought, and the blobs of all
    patches that were merged. Of the round that is open: the patches on the head, and every candidate on it with its
    patches, left out or not. The exam that the lineage began with, and the values that a branch begins with, always.

    Whoever joins late takes in every version from the first on, and each only with all that its record names: what the
    last holder has removed would end the lineage there for everybody who comes later. Means and exams could be done
    without by other rules, but next to the merged patches, which are kept, they are little, and a verdict can only be
    looked into by the exam of its time."""
    kept = {founding.exam.digest}
    kept.update(() if founding.base_values is None else (founding.base_values.digest,))
    adopted = [version.candidate for version in versions]
    open_round = [c for i, c in candidates.items() if c.parent == head or i in recent]
    for candidate in (*adopted, *open_round):
        kept.update(ref.digest for ref in candidate.blobs)
        kept.update(() if candidate.amendment is None else (candidate.amendment.exam.digest,))
        kept.update(_blobs(patches, candidate.patches))
    for candidate in open_round:
        kept.update(_blobs(patches, (left.patch for left in candidate.left_out)))
    for patch_id, patch in patches.items():
        if patch.parent == head or patch_id in recent or patch.contributor == own:
            kept.update(_blobs(patches, (patch_id,)))
        if patch.contributor == own:
            provenance = patch.provenance
            kept.update(provenance.checkpoints, provenance.states)
            kept.update(() if provenance.correction is None else (provenance.correction,))
    return frozenset(kept)


def _blobs(patches: Mapping[PatchId, Patch], ids: Collection[PatchId] | Iterator[PatchId]) -> Iterator[Digest]:
    for patch_id in ids:
        if patch_id in patches:
            yield from (ref.digest for ref in patches[patch_id].blobs)
