"""The signed records among the objects: what the index is derived from."""

from collections.abc import Iterator

from p2pmodel.domain.errors import NotFound, Rejected, StorageError
from p2pmodel.domain.ids import Digest, ModelId
from p2pmodel.domain.model import BlobRef
from p2pmodel.store.index import RecordRow
from p2pmodel.store.objects import ObjectStore
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import RECORD_OVERHEAD

MAX_RECORD_BYTES = records.MAX_MANIFEST_BYTES + RECORD_OVERHEAD
_START = b"\x84\xa4body"
"""How every record begins: a map of four, its keys sorted. Spares reading the blobs, which are most of the bytes."""


def record_row(record: bytes, seen: float) -> RecordRow:
    """The index's row for a signed manifest, patch, candidate or verdict.

    Raises Rejected when it is none of these, or fails any check that `p2pmodel.wire.records` makes.
    """
    digest = canonical.digest(record)
    kind = records.record_kind(record, MAX_RECORD_BYTES)
    model, round_ = ModelId(digest), 0
    match kind:
        case "manifest":
            records.open_manifest(record)
        case "patch":
            model = records.open_patch(record).model
        case "candidate":
            candidate, _, _ = records.open_candidate(record)
            model, round_ = candidate.model, candidate.round
        case "verdict":
            verdict = records.open_verdict(record)
            model, round_ = verdict.model, verdict.round
        case _:
            raise Rejected("kind", f"Records of kind {kind[:32]!r} are not kept.")
    try:
        return RecordRow(kind, model, BlobRef(digest, len(record)), round_, seen)
    except ValueError as error:
        raise Rejected("schema", f"This {kind} cannot be kept: {error}.") from None


def scan(objects: ObjectStore) -> Iterator[RecordRow]:
    """The rows of all records among the objects, `seen` when their objects came. Raises StorageError."""
    for digest in objects.digests():
        row = scan_one(objects, digest)
        if row is not None:
            yield row


def scan_one(objects: ObjectStore, digest: Digest) -> RecordRow | None:
    """None when the object is no record, or is gone, or damaged."""
    try:
        if objects.read(digest, 0, len(_START)) != _START:
            return None
        record = objects.load(digest, MAX_RECORD_BYTES)
        return record_row(record, objects.stored(digest) or 0.0)
    except (NotFound, Rejected, StorageError):
        return None
