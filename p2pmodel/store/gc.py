"""Removes objects that nobody needs. What is needed is said by whoever knows what the objects are."""

from collections.abc import Collection
from dataclasses import dataclass

from p2pmodel.domain.ids import Digest
from p2pmodel.store.home import Home


@dataclass(frozen=True)
class Collected:
    """objects, bytes: that were removed, or would be; kept, kept_bytes: what stays; young: of these, how many stay only
    because they came lately; swept: unfinished files of dead processes."""

    objects: int
    bytes: int
    kept: int
    kept_bytes: int
    young: int
    swept: int


def collect(home: Home, needed: Collection[Digest], before: float, *, dry_run: bool = False) -> Collected:
    """before: objects that came later, in seconds since the epoch, stay; so nothing goes that another process has just
    fetched and not yet referred to. Raises StorageError."""
    objects = home.objects
    removed = removed_bytes = kept = kept_bytes = young = 0
    for digest in list(objects.digests()):
        size, stored = objects.size(digest), objects.stored(digest)
        if size is None or stored is None:
            continue  # another process has just removed it
        if digest in needed or stored >= before:
            kept, kept_bytes = kept + 1, kept_bytes + size
            young += digest not in needed
            continue
        if not dry_run:
            objects.remove(digest)
        removed, removed_bytes = removed + 1, removed_bytes + size
    swept = 0 if dry_run else objects.sweep()
    return Collected(removed, removed_bytes, kept, kept_bytes, young, swept)
