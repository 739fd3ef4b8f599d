"""Files on their way: written aside, flushed to the disk, then renamed to where they are seen, whole or not at all.

The writer holds a lock on its file for as long as it lives. So what a dead process left can be told from what a living
one writes, in whatever container that one runs, and can be removed at any time.
"""

import fcntl
import io
import os
import secrets
from contextlib import suppress
from pathlib import Path

from p2pmodel.domain.ports import Buffer
from p2pmodel.store.disk import make_folder, storage_errors, sync_folder


class ScratchFile:
    """One file being written. Ends with `commit` or `discard`; an error of the disk discards it."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self._path = path
        self._file = file

    def write(self, chunk: Buffer) -> None:
        """Raises StorageError, and then nothing is left of the file."""
        view = memoryview(chunk).cast("B")
        try:
            with storage_errors(self._path.parent):
                while view:
                    view = view[self._file.write(view) :]
        except BaseException:
            self.discard()
            raise

    def commit(self, target: Path, mode: int) -> None:
        """Durable under its name when this returns, in place of whatever was there. Raises StorageError.

        The mode comes last, so that whatever a killed writer leaves in the scratch folder can be opened and swept.
        """
        try:
            with storage_errors(target):
                make_folder(target.parent)
                os.fsync(self._file.fileno())
                os.replace(self._path, target)
                os.fchmod(self._file.fileno(), mode)
                sync_folder(target.parent)
        except BaseException:
            self.discard()
            raise
        self._file.close()

    def discard(self) -> None:
        """Leaves nothing; may be called again."""
        if not self._file.closed:
            with suppress(OSError):  # the next sweep finds what cannot be removed now
                self._path.unlink(missing_ok=True)
            self._file.close()


class Scratch:
    """The folder of unfinished files, on the file system of what they become."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self) -> ScratchFile:
        """Raises StorageError."""
        while True:
            path = self.folder / secrets.token_hex(16)
            with storage_errors(self.folder):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                file = io.FileIO(descriptor, "w")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:
                    return ScratchFile(path, file)
                file.close()  # swept between its creation and its lock

    def write(self, target: Path, raw: Buffer, mode: int) -> None:
        """A whole small file, durable under `target` when this returns. Raises StorageError."""
        file = self.create()
        file.write(raw)
        file.commit(target, mode)

    def sweep(self) -> int:
        """Removes the files whose writers are dead, and says how many. Safe beside living writers."""
        removed = 0
        with storage_errors(self.folder):
            for entry in list(os.scandir(self.folder)):
                removed += entry.is_file(follow_symlinks=False) and _remove_unless_locked(entry.path)
        return removed


def _remove_unless_locked(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks only what is open for writing
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)
    return True
