"""A peer's folder: key, configuration, objects, refs and index. `~/.local/share/p2pmodel`, P2PMODEL_HOME or --home."""

import hashlib
import os
import re
import stat
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any

import platformdirs

from p2pmodel.domain.errors import InvalidInput, NotFound, StorageError, UsageError
from p2pmodel.store.disk import demand_writable, locked, make_folder, storage_error, storage_errors
from p2pmodel.store.index import Index
from p2pmodel.store.lock import HomeLock
from p2pmodel.store.objects import ObjectStore
from p2pmodel.store.refs import Refs
from p2pmodel.store.scan import scan
from p2pmodel.store.scratch import Scratch
from p2pmodel.store.secrets import read_swarm_key
from p2pmodel.wire.signing import Key
from p2pmodel.wire.swarm_key import SwarmKey

MAX_SOCKET_PATH = 100
"""Bytes; the kernel's sockaddr_un has 108, of which gRPC and its prefix take some."""

_FOLDERS = ("objects", "refs", "logs", "scratch")


class Home:
    """`objects`, `refs` and `index` may be used by any number of processes and threads at a time."""

    def __init__(self, path: Path) -> None:
        """Of an absolute path whose folders exist: see `open`."""
        scratch = Scratch(path / "scratch")
        self.path = path
        self.objects = ObjectStore(path / "objects", path / "corrupt", scratch)
        self.refs = Refs(path / "refs", path / "logs", path / "refs.lock", scratch)
        self.index = Index(path / "index.sqlite", path / "index.lock", lambda: scan(self.objects))
        self._scratch = scratch

    @classmethod
    def open(cls, path: Path | None = None, *, create: bool = True) -> "Home":
        """The home at `path`, else at P2PMODEL_HOME, else the user's own; its missing folders are made, mode 0700.

        Raises StorageError when it cannot be written, NotFound when it is absent and `create` is False.
        """
        asked = (path or Path(os.environ.get("P2PMODEL_HOME") or platformdirs.user_data_path("p2pmodel"))).expanduser()
        with storage_errors(asked):
            resolved = asked.resolve()
            if not create and not (resolved / _FOLDERS[0]).is_dir():
                raise NotFound(f"There is no p2pmodel home at {resolved}.", "Name one with --home or P2PMODEL_HOME.")
            for folder in (resolved, *(resolved / name for name in _FOLDERS)):
                make_folder(folder)
                demand_writable(folder)
        home = cls(resolved)
        home.objects.sweep()
        home.index.ensure()
        return home

    @property
    def key_path(self) -> Path:
        """A libp2p private key file; it is there once `key` was used."""
        return self.path / "key"

    @cached_property
    def key(self) -> Key:
        """The peer's key, made on first use, by whichever process comes first. Raises StorageError."""
        with locked(self.path / "key.lock"):
            try:
                return Key.from_libp2p(self.key_path.read_bytes())
            except FileNotFoundError:
                key = Key.generate()
                self._scratch.write(self.key_path, key.to_libp2p(), 0o600)
                return key
            except OSError as error:
                raise storage_error(error, self.key_path) from error

    def demand_place_for(self, peer: str, *, replace: bool) -> None:
        """Raises UsageError when this home has another peer's key, unless it may be replaced; StorageError."""
        if not replace and self.key_path.exists() and self.key.peer != peer:
            raise UsageError(
                f"{self.path} already has the key of {self.key.peer}.",
                "Use another --home, or replace it with --force.",
            )

    def take_key(self, key: Key, *, replace: bool) -> Path | None:
        """Makes `key` this home's. A key that is replaced is kept; where, is returned. To be called while `lock` is
        held. Raises UsageError as `demand_place_for`, StorageError."""
        self.demand_place_for(key.peer, replace=replace)
        kept = None
        with locked(self.path / "key.lock"), storage_errors(self.key_path):
            old = self.key_path.read_bytes() if self.key_path.exists() else key.to_libp2p()
            if old != key.to_libp2p():
                kept = self.path / f"key.{hashlib.sha256(old).hexdigest()[:8]}"
                self._scratch.write(kept, old, 0o600)
            self._scratch.write(self.key_path, key.to_libp2p(), 0o600)
        self.__dict__.pop("key", None)
        return kept

    @property
    def control_socket(self) -> Path:
        """Where this home's node listens: in the home, or, where that path is too long for a socket, in a private
        folder under /tmp that depends on the user and the home's path alone, so that every process finds it.

        Raises StorageError when that folder is somebody else's.
        """
        path = self.path / "control.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        folder = Path(f"/tmp/p2pmodel-{os.getuid()}")
        with storage_errors(folder):
            make_folder(folder)
            status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise StorageError(f"{folder} is not this user's private folder.", "Remove it, or use a shorter --home.")
        return folder / f"{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]}.sock"

    def lock(self) -> HomeLock:
        """Held by the node while it runs. Raises Busy when another one does, StorageError."""
        return HomeLock(self.path / "lock")

    def settings(self) -> dict[str, Any]:
        """What config.toml says; nothing when it is absent. Raises InvalidInput naming the line, StorageError."""
        path = self.path / "config.toml"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise storage_error(error, path) from error
        try:
            return tomllib.loads(raw.decode())
        except UnicodeDecodeError as error:
            line, what = raw.count(b"\n", 0, error.start) + 1, "is not UTF-8 text"
        except tomllib.TOMLDecodeError as error:
            said = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
            line = int((said and said[2]) or raw.count(b"\n") + 1)
            what = f"is not valid TOML: {said[1] if said else error}"
        raise InvalidInput(f"Line {line} of {path} {what}.", "Correct that line, or delete the file.")

    def swarm_key(self, path: Path | None = None) -> SwarmKey | None:
        """Of the private swarm: the file at `path`, else at P2PMODEL_SWARM_KEY, else where config.toml's `swarm_key`
        says, from the home on; None in a swarm that anybody may join. Raises NotFound, InvalidInput, StorageError."""
        named = path or os.environ.get("P2PMODEL_SWARM_KEY")
        if not named:
            configured = self.settings().get("swarm_key")
            if configured is None:
                return None
            if not isinstance(configured, str):
                raise InvalidInput(f"swarm_key in {self.path / 'config.toml'} is no text.", "Name the key's file.")
            named = self.path / Path(configured).expanduser()
        return read_swarm_key(Path(named).expanduser())

    def close(self) -> None:
        """Closes the index's file; what is used again opens again."""
        self.index.close()
