"""Unix sockets whose path may be longer than the 107 bytes that an address holds."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A short path that means the same socket, valid inside the block."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def answers(path: Path) -> bool:
    """Whether a process listens on the socket at `path`. False when there is none, or its process is dead."""
    if not is_socket(path):
        return False
    with reachable(path) as short, socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(short)
        except (ConnectionError, FileNotFoundError):
            return False
        return True


def is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except FileNotFoundError:
        return False
