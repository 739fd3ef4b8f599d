"""Patch files: signed by whoever writes them, checked by whoever reads them."""

from pathlib import Path

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.patch import Patch
from p2pmodel.store.scratch import Scratch
from p2pmodel.wire import bundle, canonical
from p2pmodel.wire.signing import Key


def write(
    output: Path, key: Key, patch: Patch, adapter: bytes, fisher: bytes, control: bytes | None = None
) -> tuple[PatchId, int]:
    """-> the patch's id, and the file's size in bytes. key: the contributor's; the blobs are those that the patch
    names. Raises StorageError."""
    header = key.sign("patch", patch)
    file = bundle.pack(header, adapter, fisher, control)
    Scratch(output.resolve().parent).write(output, file, 0o644)
    return canonical.digest(header), len(file)


def read(path: Path) -> bundle.OpenBundle:
    """Raises InvalidInput for a file that cannot be read or is too large, Rejected for one that is no patch, both with
    its name."""
    try:
        if (size := path.stat().st_size) > bundle.MAX_BUNDLE_BYTES:
            raise InvalidInput(f"{path} has {size} bytes, and a patch file {bundle.MAX_BUNDLE_BYTES} at most.")
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path} can't be read: {error.strerror}.") from None
    try:
        return bundle.open_bundle(raw)
    except Rejected as error:
        raise Rejected(error.reason, f"{path} is no patch file: {error.message}", error.hint) from None
