"""Slot values of versions and patches, read from a home."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from p2pmodel.domain import modular
from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import Digest, VersionId, short
from p2pmodel.domain.model import BlobRef, Manifest
from p2pmodel.domain.modular import Experts
from p2pmodel.domain.patch import Patch
from p2pmodel.logic.admission import result_limit
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.store import patchfile
from p2pmodel.store.disk import storage_errors
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, experts, variates
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change
from p2pmodel.tensors.kinds import Kinds, get_kind, slots_of
from p2pmodel.wire import canonical

_MAPPED_BYTES = 1 << 16
"""Smaller objects are read at once."""


def version_state(lineage: Lineage, version: VersionId) -> dict[str, Tensor]:
    """All slots' values at the version. Raises NotFound when they are not here."""
    ref = lineage.result(version)
    if ref is None:
        return neutral_state(lineage.manifest)
    limit = result_limit(lineage.manifest, lineage.experts(version))
    return blob.unpack(_load(lineage, version, ref, limit), lineage.slots(version), limit)


def state_bytes(lineage: Lineage, version: VersionId) -> bytes:
    """The blob of the version's slots; a neutral base's is made here. Raises NotFound."""
    ref = lineage.result(version)
    return blob.pack(neutral_state(lineage.manifest)) if ref is None else _load(lineage, version, ref)


def _load(lineage: Lineage, version: VersionId, ref: BlobRef, limit: int | None = None) -> bytes:
    if not lineage.home.objects.has(ref.digest):
        raise NotFound(
            f"The values of version {short(version)} are not on this machine yet.",
            "A node of this home fetches them: p2pmodel join",
        )
    return lineage.home.objects.load(ref.digest, limit)


def mapped(home: Home, digest: Digest, limit: int) -> Raw:
    """An object of the home, verified, and read where it is looked at if it is large. Raises as `ObjectStore.load`."""
    objects = home.objects
    if (objects.size(digest) or 0) < _MAPPED_BYTES:
        return objects.load(digest, limit)
    path = objects.verified(digest, limit)
    with storage_errors(path):
        try:
            return blob.mapped(path)
        except FileNotFoundError:
            return objects.load(digest, limit)  # which says that it is gone


def neutral_state(manifest: Manifest) -> dict[str, Tensor]:
    """The values of all slots that leave the base checkpoint as it is."""
    return Kinds(manifest.kinds).initial(manifest.slots)


def base_ref(manifest: Manifest) -> BlobRef:
    """Of the values of all slots at the base version; the neutral ones are nowhere kept."""
    if manifest.base_values is not None:
        return manifest.base_values
    return canonical.blob_ref(blob.pack(neutral_state(manifest)))


def read_change(lineage: Lineage, kind: str, adapter: Raw) -> Change:
    """What a patch's adapter blob changes, checked against the Manifest. Raises Rejected, NotFound."""
    known = get_kind(kind)
    limit = lineage.largest_patch
    if not blob.is_aligned(adapter):
        raise Rejected("schema", "The values of the patch are not aligned in its blob, as safetensors writes them.")
    return known.read(adapter, slots_of(known, lineage.manifest.slots), limit)


def read_masses(lineage: Lineage, kind: str, change: Change, fisher: Raw) -> Mapping[str, Tensor]:
    """The Fisher of a change, by slot, see `PatchKind.read_fisher`. Raises Rejected."""
    return get_kind(kind).read_fisher(change, fisher, lineage.largest_patch)


def patch_change(lineage: Lineage, patch: Patch) -> Change:
    """Of a patch whose adapter is here. Raises NotFound, Rejected."""
    limit = lineage.largest_patch
    return read_change(lineage, patch.kind, lineage.home.objects.load(patch.adapter.digest, limit))


def patch_state(lineage: Lineage, patch: Patch) -> dict[str, Tensor]:
    """All slots' values with the patch alone applied to its parent. Raises NotFound, Rejected."""
    return patch_change(lineage, patch).applied_to(version_state(lineage, patch.parent))


def patch_file_state(lineage: Lineage, path: Path) -> dict[str, Tensor]:
    """The same of a patch file. Raises InvalidInput, Rejected, NotFound."""
    opened = patchfile.read(path)
    change = read_change(lineage, opened.patch.kind, opened.raw.adapter)
    new_experts(lineage, opened.patch, change)
    return change.applied_to(version_state(lineage, opened.patch.parent))


def new_experts(lineage: Lineage, patch: Patch, change: Change) -> Experts:
    """Those that the patch adds to its parent's. Raises Rejected for a part of one that is nowhere."""
    if patch.kind != modular.KIND:
        return ()
    pools = slots_of(get_kind(patch.kind), lineage.manifest.slots)
    return experts.check_parent(change, pools, lineage.experts(patch.parent))


def round_mean(lineage: Lineage, version: VersionId, kind: str) -> dict[str, Tensor] | None:
    """The mean of the control variates of the version's patches of the kind, by trained parameter; None where it has
    none. Raises NotFound when it is not on this machine."""
    while version != lineage.model and lineage.version(version).candidate.amends:
        version = lineage.version(version).candidate.parent  # whose values it has
    ref = None if version == lineage.model else lineage.version(version).candidate.control
    if ref is None or not variates.has_mean(kind):
        return None
    limit, manifest = result_limit(lineage.manifest, lineage.experts(version)), lineage.manifest
    mean = variates.read_mean(lineage.home.objects.load(ref.digest, limit), manifest.kinds, manifest.slots, limit)
    own = {slot.name for slot in slots_of(get_kind(kind), manifest.slots)}
    return {name: mean[name] for name in sorted(own)} if own <= mean.keys() else None
