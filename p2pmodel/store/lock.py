"""One node a home: a lock that the kernel lets go when its process ends, however it ends."""

import os
from pathlib import Path
from types import TracebackType

from p2pmodel.domain.errors import Busy
from p2pmodel.store.disk import storage_errors, try_lock


class HomeLock:
    """Held from its making on, until `release`, the end of its `with`, or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Raises Busy when another process, or another lock of this one, holds it; StorageError."""
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not try_lock(self._descriptor, path):
                holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()
                who = f"process {holder}" if holder.isdecimal() else "the other one"
                raise Busy(
                    f"Another node runs on this home, {path.parent}.",
                    f"End {who}, or give this one a home of its own with --home.",
                )
            with storage_errors(path):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "HomeLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
