"""Slot values of versions and patches, read from a home."""

from pathlib import Path

from torch import Tensor

from p2pmodel.domain.errors import NotFound
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.domain.model import BlobRef
from p2pmodel.node.lineage import Lineage
from p2pmodel.tensors import blob
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.wire import bundle


def version_state(lineage: Lineage, version: VersionId) -> dict[str, Tensor]:
    """All slots' values at the version, the neutral ones for the base. Raises NotFound when they are not here."""
    ref = lineage.result(version)
    if ref is None:
        return get_kind(lineage.manifest.kinds[0]).initial(lineage.manifest.slots)
    if not lineage.home.objects.has(ref.digest):
        raise NotFound(
            f"The values of version {short(version)} are not on this machine yet.",
            "A node of this home fetches them: p2pmodel join",
        )
    return patch_tensors(lineage, ref)


def patch_tensors(lineage: Lineage, ref: BlobRef) -> dict[str, Tensor]:
    """A blob of slot tensors, checked against the Manifest's slots."""
    limit = lineage.manifest.limits.max_patch_bytes
    return blob.unpack(lineage.home.objects.load(ref.digest, limit), lineage.manifest.slots, limit)


def patch_file_state(lineage: Lineage, path: Path) -> dict[str, Tensor]:
    """All slots' values with the patch of the file applied to its parent. Raises Rejected, NotFound."""
    opened = bundle.open_bundle(path.read_bytes())
    limit = lineage.manifest.limits.max_patch_bytes
    return {
        **version_state(lineage, opened.patch.parent),
        **blob.unpack(opened.raw.adapter, lineage.manifest.slots, limit),
    }
