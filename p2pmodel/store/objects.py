"""Immutable bytes by their SHA-256, one file each: `objects/ab/cdef…`.

A file is seen under its digest only once it is whole and on the disk. It is verified again whenever it is loaded,
because disks rot; a file that is not what its name says is moved to `corrupt/`, so that it counts as absent and is
fetched again.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from p2pmodel.domain.errors import NotFound, Rejected, StorageError
from p2pmodel.domain.ids import Digest, short
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.ports import Buffer
from p2pmodel.store.disk import make_folder, storage_error, storage_errors, sync_folder
from p2pmodel.store.scratch import Scratch, ScratchFile
from p2pmodel.wire import canonical

_log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9a-f]{2}")
_READ_ONLY = 0o400


class ObjectStore:
    """A `BlobSource`. What is no digest at all is simply not here, so names from peers need no check before."""

    def __init__(self, folder: Path, corrupt: Path, scratch: Scratch) -> None:
        self._folder = folder
        self._corrupt = corrupt
        self._scratch = scratch

    def put(self, raw: bytes) -> BlobRef:
        """Durable when this returns; putting the same bytes again mends a damaged copy. Raises StorageError."""
        ref = canonical.blob_ref(raw)
        path = self._path(ref.digest)
        try:
            known = self.verify(ref.digest)
        except NotFound:
            known = False
        if known:
            with storage_errors(path):
                sync_folder(path.parent)  # whoever renamed it may not have come to this yet
        else:
            self._scratch.write(path, raw, _READ_ONLY)
        return ref

    def has(self, digest: Digest) -> bool:
        return self.size(digest) is not None

    def size(self, digest: Digest) -> int | None:
        """In bytes; None when it is not here."""
        status = self._status(digest)
        return status and status.st_size

    def stored(self, digest: Digest) -> float | None:
        """When it came here, in seconds since the epoch; None when it is not here."""
        status = self._status(digest)
        return status and status.st_mtime

    def load(self, digest: Digest, limit: int | None = None) -> bytes:
        """The whole object, verified.

        Raises NotFound; Rejected("size") over `limit` bytes, before reading; StorageError when the bytes on the disk
        are not what they were, after which the object is absent.
        """
        with self._open(digest) as file, storage_errors(self._path(digest)):
            _check_size(digest, os.fstat(file.fileno()).st_size, limit)
            raw = file.readall()
        if canonical.digest(raw) != digest:
            self._set_aside(digest)
            raise _damaged(digest)
        return raw

    def verified(self, digest: Digest, limit: int | None = None) -> Path:
        """The file of an object that was verified just now, for readers that map it into memory. Raises as `load`."""
        _check_size(digest, self.size(digest) or 0, limit)
        if not self.verify(digest):
            raise _damaged(digest)
        return self._path(digest)

    def read(self, digest: Digest, offset: int, length: int) -> bytes:
        """The bytes from `offset` on, at most `length`, fewer at the end. Not verified: its receiver does that.

        Raises NotFound, StorageError.
        """
        with self._open(digest) as file, storage_errors(self._path(digest)):
            return os.pread(file.fileno(), length, offset)

    def path(self, digest: Digest) -> Path:
        """The file, for readers that map it into memory; not verified. Raises NotFound."""
        if not self.has(digest):
            raise _absent(digest)
        return self._path(digest)

    def sink(self, digest: Digest, size: int) -> "ObjectSink":
        """Where the object of `size` bytes goes while it arrives. Raises Rejected("digest"), StorageError."""
        if not _DIGEST.fullmatch(digest) or size < 0:
            raise Rejected("digest", "What was offered has no SHA-256 digest or no size.")
        return ObjectSink(self._scratch.create(), self._path(digest), BlobRef(digest, size))

    def digests(self) -> Iterator[Digest]:
        """All objects, in the order of their digests. Raises StorageError."""
        with storage_errors(self._folder):
            folders = sorted(entry.name for entry in os.scandir(self._folder) if _FOLDER.fullmatch(entry.name))
        for folder in folders:
            with storage_errors(self._folder / folder):
                names = sorted(folder + entry.name for entry in os.scandir(self._folder / folder))
            yield from (Digest(name) for name in names if _DIGEST.fullmatch(name))

    def verify(self, digest: Digest) -> bool:
        """Reads it all; False when it was damaged, and then it is moved aside. Raises NotFound, StorageError."""
        with self._open(digest) as file, storage_errors(self._path(digest)):
            intact = hashlib.file_digest(file, "sha256").hexdigest() == digest
        if not intact:
            self._set_aside(digest)
        return intact

    def remove(self, digest: Digest) -> None:
        """Nothing happens when it is not here. Raises StorageError."""
        if _DIGEST.fullmatch(digest):
            path = self._path(digest)
            with storage_errors(path):
                path.unlink(missing_ok=True)

    def sweep(self) -> int:
        """Removes the unfinished files of dead processes, and says how many. Raises StorageError."""
        return self._scratch.sweep()

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest[2:]

    def _status(self, digest: str) -> os.stat_result | None:
        if not _DIGEST.fullmatch(digest):
            return None
        path = self._path(digest)
        try:
            return path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, path) from error

    def _open(self, digest: str) -> io.FileIO:
        path = self._path(digest)
        try:
            if _DIGEST.fullmatch(digest):
                return path.open("rb", buffering=0)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, path) from error
        raise _absent(digest)

    def _set_aside(self, digest: str) -> None:
        path = self._path(digest)
        with storage_errors(path):
            make_folder(self._corrupt)
            try:
                os.replace(path, self._corrupt / digest)
            except FileNotFoundError:
                return  # another reader found it first
        _log.warning("object %s was damaged on the disk, and was moved to %s", digest, self._corrupt)


class ObjectSink:
    """A `BlobSink` into the store: hashed while it is written, never larger than promised, seen only when right."""

    def __init__(self, file: ScratchFile, path: Path, promised: BlobRef) -> None:
        self._file = file
        self._path = path
        self._promised = promised
        self._written = 0
        self._hash = hashlib.sha256()

    def write(self, chunk: Buffer) -> None:
        """Raises Rejected("size") beyond the promised size, StorageError; nothing is left then."""
        self._written += memoryview(chunk).nbytes
        if self._written > self._promised.size:
            self.abort()
            name = short(self._promised.digest)
            raise Rejected("size", f"More than the promised {self._promised.size} bytes of {name} came.")
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> None:
        """Durable and visible when this returns. Raises Rejected("digest"), StorageError; nothing is left then."""
        if self._written != self._promised.size or self._hash.hexdigest() != self._promised.digest:
            self.abort()
            raise Rejected("digest", f"The bytes that came are not {short(self._promised.digest)}.")
        self._file.commit(self._path, _READ_ONLY)

    def abort(self) -> None:
        """Leaves nothing; may be called again, and after `finish`."""
        self._file.discard()


def _check_size(digest: Digest, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise Rejected("size", f"Object {short(digest)} of {size} bytes is over the limit of {limit}.")


def _damaged(digest: Digest) -> StorageError:
    return StorageError(
        f"Object {short(digest)} was damaged on the disk.",
        "It was moved aside and will be fetched again; check the disk with p2pmodel fsck.",
    )


def _absent(digest: str) -> NotFound:
    return NotFound(f"Object {short(digest)!r} is not here.")
