"""What every part of the store does with the operating system: error sentences, private folders, file locks."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from p2pmodel.domain.errors import Busy, StorageError

LOCK_SECONDS = 30.0
"""How long to wait for another process's short write before saying that it hangs."""

_ELSEWHERE = "Choose another folder with --home or P2PMODEL_HOME."
_SENTENCES = {
    errno.ENOSPC: ("The disk that holds {path} is full.", f"Free some space. {_ELSEWHERE}"),
    errno.EDQUOT: ("Your disk quota for {path} is used up.", f"Free some space. {_ELSEWHERE}"),
    errno.EFBIG: ("Writing {path} failed at the limit on the size of files.", "Raise the limit (ulimit -f)."),
    errno.EROFS: ("{path} is on a file system that is mounted read-only.", _ELSEWHERE),
    errno.EACCES: ("This user may not read and write {path}.", f"Change its owner or its mode. {_ELSEWHERE}"),
    errno.EPERM: ("This user may not change {path}.", f"Change its owner or its mode. {_ELSEWHERE}"),
    errno.ENOTDIR: ("{path} is not a folder.", _ELSEWHERE),
    errno.ENAMETOOLONG: ("{path} is too long for a path.", _ELSEWHERE),
    errno.EIO: ("The disk failed to read or write {path}.", "Check the disk, then run p2pmodel fsck."),
    errno.EMFILE: ("Too many files are open to use {path}.", "Raise the limit on open files (ulimit -n)."),
    errno.ENOLCK: ("The file system of {path} has no file locks.", _ELSEWHERE),
}


def storage_error(error: OSError, path: Path) -> StorageError:
    """One sentence for what the operating system said about `path`."""
    unknown = f"{{path}} cannot be used: {error.strerror or error}.", _ELSEWHERE
    sentence, hint = _SENTENCES.get(error.errno or 0, unknown)
    return StorageError(sentence.format(path=path), hint)


def busy(path: Path, seconds: float) -> Busy:
    return Busy(f"Another process has held {path} for {seconds:.0f} seconds.", "See which with lsof, and end it.")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns every OSError of its block into a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def sync_folder(path: Path) -> None:
    """Makes renames and removals inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """The folder and its missing parents, readable by this user alone; folders that are there keep their mode."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(0o700)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    with suppress(PermissionError):  # a parent that may be entered and written, but not listed
        sync_folder(path.parent)


def demand_writable(path: Path) -> None:
    """Raises the OSError that a write into this folder would raise."""
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, os.strerror(code), str(path))


@contextmanager
def locked(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Excludes other processes, and other threads of this one, for a short write. The kernel frees it with its process.

    Raises Busy when nobody lets go within `seconds`, StorageError when the lock file cannot be had.
    """
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while not try_lock(descriptor, path):
            if time.monotonic() > deadline:
                raise busy(path, seconds)
            time.sleep(0.002)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, path: Path) -> bool:
    """False when another open file holds the lock. Raises StorageError where files cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise storage_error(error, path) from error
    return True
