"""The patch file: one file with the signed header and its two blobs, so that a patch can be sent by any means.

Canonical encoding of `Bundle`. The file proves nothing by itself: `open_bundle` checks that the blobs are those that
the header names and that the header is signed by its contributor.
"""

from dataclasses import dataclass

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.patch import Patch
from p2pmodel.wire import canonical, records

MAX_BUNDLE_BYTES = 4 << 30
SUFFIX = ".p2patch"


@dataclass(frozen=True)
class Bundle:
    header: bytes
    adapter: bytes
    fisher: bytes


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that was checked: `id` is the header record's digest."""

    id: PatchId
    patch: Patch
    raw: Bundle


def pack(header: bytes, adapter: bytes, fisher: bytes) -> bytes:
    return canonical.encode(Bundle(header, adapter, fisher))


def open_bundle(raw: bytes, limit: int = MAX_BUNDLE_BYTES) -> OpenBundle:
    """Raises Rejected for a file that is truncated, tampered with, unsigned, or whose blobs are not the header's."""
    bundle = canonical.decode(raw, Bundle, limit)
    patch = records.open_patch(bundle.header)
    for name, blob, ref in (("adapter", bundle.adapter, patch.adapter), ("fisher", bundle.fisher, patch.fisher)):
        if BlobRef(canonical.digest(blob), len(blob)) != ref:
            raise Rejected("digest", f"The file's {name} is not the one that its signed header names.")
    return OpenBundle(canonical.digest(bundle.header), patch, bundle)
