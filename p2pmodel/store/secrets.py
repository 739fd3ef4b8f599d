"""Files that hold secrets: made 0600, whole or not at all, and not read when other users could have read them first."""

import os
import stat
from pathlib import Path

from p2pmodel.domain.errors import InvalidInput, NotFound, UsageError
from p2pmodel.store.disk import storage_error
from p2pmodel.store.scratch import Scratch
from p2pmodel.wire.swarm_key import MAX_FILE_BYTES, SwarmKey

OTHERS = stat.S_IWGRP | stat.S_IRWXO
"""Permissions that a secret must not have. A group may read it, as secrets that are mounted into a container are."""


def read_secret(path: Path, limit: int, what: str, hint: str, *, secret: bool = True) -> bytes:
    """At most `limit` + 1 bytes. what: such as "swarm key"; hint: for one that is missing; secret: False for what goes
    with secrets, and anybody may read.

    Raises NotFound, InvalidInput when other users can read or write it, StorageError.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError
            if secret and status.st_mode & OTHERS:
                raise InvalidInput(f"The {what} {path} can be read or changed by other users.", f"chmod 600 {path}")
            return file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(f"There is no {what} at {path}.", hint) from None
    except OSError as error:
        raise storage_error(error, path) from error


def write_secret(path: Path, raw: bytes, *, replace: bool = False) -> None:
    """Mode 0600, and durable when this returns. Raises UsageError when something is there and `replace` is False,
    StorageError."""
    if not replace and os.path.lexists(path):
        raise UsageError(f"{path} is there already.", "Choose another name, or remove it first.")
    Scratch(path.parent).write(path, raw, 0o600)


def read_swarm_key(path: Path) -> SwarmKey:
    """Raises NotFound, InvalidInput, StorageError."""
    hint = "Get it from a member of the swarm, or make one: p2pmodel swarm-key new FILE"
    return SwarmKey.from_text(read_secret(path, MAX_FILE_BYTES, "swarm key", hint), str(path))
