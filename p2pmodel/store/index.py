"""What records are known, by model, kind and digest: derived from the objects, in SQLite, safe to delete at any time.

A file that is missing, damaged, or was removed under a running process is made again from the objects. WAL mode, so
that readers do not wait for a writer; no connection outlives its file.
"""

import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TypeVar

from p2pmodel.domain.errors import Busy, StorageError
from p2pmodel.domain.ids import Digest, ModelId, check_digest
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.version import MAX_ROUND
from p2pmodel.store.disk import busy, locked, storage_errors

_log = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_SECONDS = 30.0

_PREFIX = re.compile(r"[0-9a-f]{0,64}")
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_SELECT = "SELECT kind, model, record, size, round, seen FROM records"
_INSERT = "INSERT INTO records (kind, model, record, size, round, seen) VALUES (?, ?, ?, ?, ?, ?)"
_UPDATE = """ON CONFLICT (record) DO UPDATE SET
    kind = excluded.kind, model = excluded.model, size = excluded.size, round = excluded.round"""

_MIGRATIONS = (
    (
        """CREATE TABLE records (
        record TEXT PRIMARY KEY, size INTEGER NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, round INTEGER NOT NULL,
        seen REAL NOT NULL)""",
        "CREATE INDEX records_by_model ON records (model, seen, record)",
    ),
)
"""Statements that take the schema from version n to n + 1; `PRAGMA user_version` says where a file is."""


@dataclass(frozen=True)
class RecordRow:
    """`record` is the signed record's object; `round` 0 where the kind has none; `seen` in seconds since the epoch."""

    kind: str
    model: ModelId
    record: BlobRef
    round: int
    seen: float

    def __post_init__(self) -> None:
        check_digest(self.model, "record model")
        if not 0 <= self.round <= MAX_ROUND:
            raise ValueError("the record's round is out of range")
        if not isfinite(self.seen):
            raise ValueError("the record's time is not finite")


class Index:
    """Usable from every thread. Its methods raise StorageError, and Busy when another process's write does not end."""

    def __init__(self, path: Path, lock: Path, source: Callable[[], Iterable[RecordRow]]) -> None:
        """`source` yields the rows of all records among the objects; a new file is filled from it."""
        self._path = path
        self._lock = lock
        self._source = source
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._filled = 0

    def ensure(self) -> None:
        """Makes and fills the file where there is none, so that what comes from now on is told from what was there."""
        if not _inode(self._path):
            self._run(lambda sql: None)

    def add(self, row: RecordRow) -> bool:
        """False when the record was known. Where this call had to make the file again, nothing counts as known."""
        with self._mutex:
            filled = self._filled
            inserted = self._run(lambda sql: sql.execute(f"{_INSERT} ON CONFLICT DO NOTHING", _values(row)).rowcount)
            return inserted == 1 or self._filled != filled

    def records(self, model: ModelId, kind: str | None = None) -> list[RecordRow]:
        """Of one model, ordered by (seen, digest)."""
        query = f"{_SELECT} WHERE model = ? AND kind = coalesce(?, kind) ORDER BY seen, record"
        return self._run(lambda sql: [_row(values) for values in sql.execute(query, (model, kind))])

    def find(self, prefix: str) -> list[RecordRow]:
        """The records whose digests begin with `prefix`, ordered by digest; none when it is not hexadecimal."""
        prefix = prefix.lower()
        if not _PREFIX.fullmatch(prefix):
            return []
        query = f"{_SELECT} WHERE record BETWEEN ? AND ? ORDER BY record"
        return self._run(lambda sql: [_row(values) for values in sql.execute(query, (prefix, prefix + "g"))])

    def models(self) -> list[ModelId]:
        """All models that some record is of, the first seen first."""
        query = "SELECT model FROM records GROUP BY model ORDER BY min(seen), model"
        return self._run(lambda sql: [ModelId(model) for (model,) in sql.execute(query)])

    def rebuild(self, source: Callable[[], Iterable[RecordRow]]) -> int:
        """Makes it say what `source` yields, and keeps when each record was first seen. The number of its rows then.

        What other processes add meanwhile stays, since `source` may have passed by already.
        """
        return self._run(lambda sql: self._rebuild(sql, source))

    def close(self) -> None:
        """It opens again by itself when it is used."""
        with self._mutex:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _rebuild(self, sql: sqlite3.Connection, source: Callable[[], Iterable[RecordRow]]) -> int:
        if [answer for (answer,) in sql.execute("PRAGMA quick_check")] != ["ok"]:
            sql = self._replace()
        (last,) = sql.execute("SELECT coalesce(max(rowid), 0) FROM records").fetchone()
        rows = list(source())
        sql.execute("BEGIN IMMEDIATE")
        with sql:  # commits, or rolls back
            sql.execute("CREATE TEMP TABLE IF NOT EXISTS found (record TEXT PRIMARY KEY)")
            sql.execute("DELETE FROM found")
            sql.executemany("INSERT OR IGNORE INTO found VALUES (?)", [(row.record.digest,) for row in rows])
            sql.execute("DELETE FROM records WHERE rowid <= ? AND record NOT IN (SELECT record FROM found)", (last,))
            sql.executemany(f"{_INSERT} {_UPDATE}", map(_values, rows))
            (count,) = sql.execute("SELECT count(*) FROM records").fetchone()
        return int(count)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._mutex:
            try:
                try:
                    return work(self._opened())
                except sqlite3.DatabaseError as error:
                    if _code(error) not in _BROKEN:
                        raise
                    return work(self._replace())
            except sqlite3.Error as error:
                raise self._explained(error) from error

    def _opened(self) -> sqlite3.Connection:
        """A connection to the file that is at the path now, made and filled where it has to be."""
        if self._connection is not None and _inode(self._path) == self._inode:
            return self._connection
        with locked(self._lock):
            return self._open()

    def _replace(self) -> sqlite3.Connection:
        """A new file in place of a damaged one, unless another process was faster."""
        with locked(self._lock):
            if _inode(self._path) == self._inode:
                _log.warning("the index %s is damaged, and is made again from the objects", self._path)
                with storage_errors(self._path):
                    for suffix in ("", "-wal", "-shm"):
                        self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        self.close()
        with storage_errors(self._path):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # for its mode and its inode
        self._inode = _inode(self._path)
        sql = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            sql.execute("PRAGMA journal_mode = WAL")
            sql.execute("PRAGMA synchronous = NORMAL")
            self._migrate(sql)
        except BaseException:
            sql.close()
            raise
        self._connection = sql
        return sql

    def _migrate(self, sql: sqlite3.Connection) -> None:
        (version,) = sql.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise StorageError(
                f"{self._path} was written by a newer p2pmodel.",
                "Upgrade, or delete the file: it is made again from the objects.",
            )
        if version == len(_MIGRATIONS):
            return
        sql.execute("BEGIN IMMEDIATE")
        with sql:
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    sql.execute(statement)
            if version == 0:
                sql.executemany(_INSERT, map(_values, self._source()))
                self._filled += 1
            sql.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def _explained(self, error: sqlite3.Error) -> Busy | StorageError:
        code = _code(error)
        if code in _BUSY:
            return busy(self._path, BUSY_SECONDS)
        if code == sqlite3.SQLITE_FULL:
            return StorageError(f"The disk that holds {self._path} is full.", "Free some space, then repeat.")
        return StorageError(
            f"The index {self._path} cannot be used: {error}.",
            "Check the disk; if that is well, delete the file: it is made again from the objects.",
        )


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; the errors of Python's own module have none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _inode(path: Path) -> int:
    """0 when there is no such file."""
    with storage_errors(path):
        try:
            return path.stat().st_ino
        except FileNotFoundError:
            return 0


def _values(row: RecordRow) -> tuple[str, str, str, int, int, float]:
    return row.kind, row.model, row.record.digest, row.record.size, row.round, row.seen


def _row(values: tuple[str, str, str, int, int, float]) -> RecordRow:
    kind, model, record, size, round_, seen = values
    return RecordRow(kind, ModelId(Digest(model)), BlobRef(Digest(record), size), round_, seen)
