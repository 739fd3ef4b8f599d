"""The patch file: one file with the signed header and its blobs, so that a patch can be sent by any means.

Canonical encoding of `Bundle`. The file proves nothing by itself: `open_bundle` checks that the blobs are those that
the header names and that the header is signed by its contributor.
"""

from dataclasses import dataclass

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.patch import Patch
from p2pmodel.wire import canonical, records

MAX_BUNDLE_BYTES = 4 << 30


@dataclass(frozen=True)
class Bundle:
    header: bytes
    adapter: bytes
    fisher: bytes
    control: bytes | None = None

    @property
    def blobs(self) -> tuple[bytes, ...]:
        """In the order of `Patch.blobs`."""
        return (self.adapter, self.fisher) if self.control is None else (self.adapter, self.fisher, self.control)


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that was checked: `id` is the header record's digest. offsets: where its blobs begin in the file."""

    id: PatchId
    patch: Patch
    raw: Bundle
    offsets: tuple[int, ...]


def pack(header: bytes, adapter: bytes, fisher: bytes, control: bytes | None = None) -> bytes:
    return canonical.encode(Bundle(header, adapter, fisher, control))


def open_bundle(raw: bytes, limit: int = MAX_BUNDLE_BYTES) -> OpenBundle:
    """Raises Rejected for a file that is truncated, tampered with, unsigned, or whose blobs are not the header's."""
    bundle = canonical.decode(raw, Bundle, limit)
    patch = records.open_patch(bundle.header)
    if (bundle.control is None) != (patch.control is None):
        raise Rejected("digest", "The file has a control variate that its signed header does not name, or lacks it.")
    for name, blob, ref in zip(("adapter", "Fisher", "control variate"), bundle.blobs, patch.blobs, strict=False):
        if canonical.blob_ref(blob) != ref:
            raise Rejected("digest", f"The file's {name} is not the one that its signed header names.")
    return OpenBundle(canonical.digest(bundle.header), patch, bundle, _offsets(raw, bundle))


def _offsets(raw: bytes, bundle: Bundle) -> tuple[int, ...]:
    """Where the blobs begin. Each field's bytes come after its name and a few more, the fields in the order of their
    names."""
    found: dict[str, int] = {}
    at = 0
    for name, part in sorted(vars(bundle).items()):
        if part is not None:
            at = next(begin for begin in range(at, len(raw)) if raw.startswith(part, begin))
            found[name] = at
            at += len(part)
    return tuple(found[name] for name in ("adapter", "fisher", "control") if name in found)
