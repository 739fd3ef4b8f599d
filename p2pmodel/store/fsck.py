"""Checks everything: objects by their digests, refs by what they name, the index by making it again."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from p2pmodel.domain.errors import NotFound, StorageError
from p2pmodel.domain.ids import Digest
from p2pmodel.store.home import Home
from p2pmodel.store.index import RecordRow
from p2pmodel.store.scan import scan_one
from p2pmodel.wire import records

_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class FsckReport:
    """`objects` and their `bytes` are what is intact; `corrupt` objects were moved aside; `records` counts the rows of
    the new index; `dangling_refs` name an object or a version that is not here; `swept` unfinished files are gone."""

    objects: int
    bytes: int
    corrupt: tuple[Digest, ...]
    records: int
    dangling_refs: tuple[str, ...]
    swept: int


@dataclass
class _Inspection:
    home: Home
    bytes: int = 0
    intact: set[str] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)
    corrupt: list[Digest] = field(default_factory=list)

    def rows(self) -> Iterator[RecordRow]:
        for digest in self.home.objects.digests():
            with suppress(NotFound):  # another process has just removed it
                row = self.inspect(digest)
                if row is not None:
                    yield row

    def inspect(self, digest: Digest) -> RecordRow | None:
        """None when the object is no record, or is damaged. Raises NotFound."""
        objects = self.home.objects
        if not objects.verify(digest):
            self.corrupt.append(digest)
            return None
        self.intact.add(digest)
        self.bytes += objects.size(digest) or 0
        row = scan_one(objects, digest)
        if row is not None and row.kind == "candidate":
            self.versions.add(records.open_candidate(objects.load(digest))[2])
        return row

    def dangling(self, name: str) -> bool:
        """Every digest in a ref's value is that of an object, or of a version whose candidate is here."""
        try:
            value = self.home.refs.get(name) or ""
        except StorageError:
            return True
        return any(digest not in self.intact | self.versions for digest in _DIGEST.findall(value))


def fsck(home: Home) -> FsckReport:
    """Safe while a node runs on the home. Raises StorageError when the disk itself fails, Busy."""
    swept = home.objects.sweep()
    inspection = _Inspection(home)
    rows = home.index.rebuild(inspection.rows)
    dangling = tuple(name for name in home.refs.names() if inspection.dangling(name))
    return FsckReport(len(inspection.intact), inspection.bytes, tuple(inspection.corrupt), rows, dangling, swept)
