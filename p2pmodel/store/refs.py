"""The only mutable truth: names such as `models/<id>/head`, one file each, moved by compare-and-swap, with a log.

A change is written to the log before it is made. So a process killed between the two leaves a line for a change that
never happened; it is told by what follows, the next line or the ref, starting where it started, and is not shown.
"""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import EllipsisType

from p2pmodel.domain.errors import Busy, InvalidInput, StorageError
from p2pmodel.store.disk import locked, storage_error, storage_errors, sync_folder
from p2pmodel.store.scratch import Scratch

MAX_VALUE_BYTES = 4096
MAX_NAME = 200
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,7}")


@dataclass(frozen=True)
class RefChange:
    """`time` in seconds since the epoch; `old` is None where the ref was new."""

    time: float
    old: str | None
    new: str


class Refs:
    def __init__(self, folder: Path, logs: Path, lock: Path, scratch: Scratch) -> None:
        self._folder = folder
        self._logs = logs
        self._lock = lock
        self._scratch = scratch

    def get(self, name: str) -> str | None:
        """None when there is no such ref. Raises InvalidInput for what is no name, StorageError."""
        path = self._folder / _checked(name)
        try:
            return path.read_text("utf-8").removesuffix("\n")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise storage_error(error, path) from error
        except UnicodeDecodeError:
            raise StorageError(f"The ref {path} is damaged.", "Delete the file, then run p2pmodel fsck.") from None

    def set(self, name: str, value: str, expected: str | EllipsisType | None = ...) -> None:
        """Durable when this returns. With `expected`, only from that value, None for a ref that is not there yet.

        Raises Busy when the ref is not what was expected, or other writers hang; InvalidInput for a name or a value
        that cannot be; StorageError.
        """
        path, log = self._folder / _checked(name), self._log(name)
        if not value or not value.isprintable() or len(value.encode()) > MAX_VALUE_BYTES:
            raise InvalidInput(f"A ref's value is one line of 1 to {MAX_VALUE_BYTES} bytes of text.")
        with locked(self._lock):
            old = self.get(name)
            if expected is not ... and old != expected:
                raise Busy(f"The ref {name} was moved by another process.", "Look at it again, then repeat the change.")
            if old == value:
                with storage_errors(path):
                    return sync_folder(path.parent)
            self._make_room(name)
            with storage_errors(log):
                _append(log, json.dumps([time.time(), old, value]))
            self._scratch.write(path, value.encode() + b"\n", 0o600)

    def delete(self, name: str) -> None:
        """With its log. Nothing happens when it is not there. Raises InvalidInput, Busy, StorageError."""
        path, log = self._folder / _checked(name), self._log(name)
        with locked(self._lock), storage_errors(path):
            log.unlink(missing_ok=True)
            if path.is_file():
                path.unlink()
                sync_folder(path.parent)

    def names(self, prefix: str = "") -> list[str]:
        """All refs whose names begin with `prefix`, sorted. Raises StorageError."""
        with storage_errors(self._folder):
            files = [path for path in self._folder.rglob("*") if path.is_file()]
        names = sorted(path.relative_to(self._folder).as_posix() for path in files)
        return [name for name in names if name.startswith(prefix) and _NAME.fullmatch(name)]

    def log(self, name: str) -> list[RefChange]:
        """The ref's changes since it was made, the oldest first. Raises InvalidInput, StorageError."""
        path = self._log(_checked(name))
        try:
            lines = path.read_text("utf-8", errors="replace").split("\n")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return []
        except OSError as error:
            raise storage_error(error, path) from error
        changes = [change for change in map(_parsed, lines) if change]
        starts = [change.old for change in changes[1:]] + [self.get(name)]
        followed = zip(changes, starts, strict=True)
        return [change for change, start in followed if start == change.new or start != change.old]

    def _log(self, name: str) -> Path:
        """Flat, so that a log never stands in the way of another's."""
        return self._logs / name.replace("/", "%")

    def _make_room(self, name: str) -> None:
        """A name is a file or a folder, not both; folders that hold no ref any more give way."""
        path = self._folder / name
        parents = [parent.as_posix() for parent in PurePosixPath(name).parents][:-1]
        beside = [parent for parent in parents if (self._folder / parent).is_file()]
        if path.is_dir():
            beside += self.names(name + "/")
        if beside:
            raise InvalidInput(f"There cannot be a ref {name} beside the ref {beside[0]}.")
        if path.is_dir():
            with storage_errors(path):
                for folder in sorted(path.rglob("*"), reverse=True):
                    folder.rmdir()
                path.rmdir()


def _checked(name: str) -> str:
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:64]!r} is no name for a ref.",
            "Use letters, digits, '.', '_' and '-', in up to 8 parts between slashes.",
        )
    return name


def _append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        raw = memoryview(("\n" * bool(torn) + line + "\n").encode())
        while raw:
            raw = raw[os.write(descriptor, raw) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parsed(line: str) -> RefChange | None:
    """None for a line that a power cut or a full disk tore."""
    try:
        when, old, new = json.loads(line)
        return RefChange(float(when), old, new)
    except (ValueError, TypeError):
        return None
