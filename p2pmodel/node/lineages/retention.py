"""`p2pmodel gc`: what of a home's objects stays."""

import re
import time
from collections.abc import Iterator
from contextlib import suppress

from p2pmodel.domain.errors import NotFound, P2PModelError, StorageError, UsageError
from p2pmodel.domain.ids import Digest, VersionId, short
from p2pmodel.engine.training.resuming import MAX_PROGRESS_BYTES, Progress
from p2pmodel.logic.retention import needed_blobs
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.node.lineages.notes import CONTRIBUTING
from p2pmodel.store.gc import Collected, collect
from p2pmodel.store.home import Home

DAY = 86_400.0
SHORTEST_DAYS = 1 / 24
"""While a node may be running: what it has fetched and not yet stored a record of is younger than this."""
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


def collect_garbage(home: Home, days: float, *, dry_run: bool = False) -> Collected:
    """Removes what nothing refers to any more, and the blobs of patches that were left out or came too late, and of
    candidates that nobody adopted, once they are here for `days`. Records stay: they are small, and what a peer knows
    of it is not sent again.

    Raises UsageError for fewer days than are safe, StorageError, Busy.
    """
    if not days >= SHORTEST_DAYS:
        raise UsageError(
            "What came within the last hour has to stay.", f"Use at least --keep-days {SHORTEST_DAYS:.2f}."
        )
    before = time.time() - days * DAY
    try:
        lineages = known_lineages(home)
    except NotFound as error:
        raise StorageError(
            f"A Manifest is missing, so what is needed can't be told: {error.message}", "Run: p2pmodel fsck"
        ) from None
    needed: set[Digest] = set()
    for lineage in lineages:
        rows = home.index.records(lineage.model)
        if lost := [row for row in rows if not lineage.knows(row.record.digest)]:
            raise StorageError(
                f"The bytes of {lost[0].kind} {short(lost[0].record.digest)} are not here, so what is needed can't be "
                "told.",
                "Run: p2pmodel fsck",
            )
        needed.update(row.record.digest for row in rows)
        young = {row.record.digest for row in rows if row.seen >= before}
        needed |= _needed(lineage, young)
    stale = [name for lineage in lineages for name in _outlived(lineage)]
    for name in home.refs.names():
        if name not in stale:
            needed |= _referred(home, home.refs.get(name) or "")
    if not dry_run:
        for name in stale:
            home.refs.delete(name)
    return collect(home, needed, before, dry_run=dry_run)


def _needed(lineage: Lineage, young: set[Digest]) -> frozenset[Digest]:
    recent: set[Digest] = set(young)
    for row in lineage.home.index.records(lineage.model, "candidate"):
        if row.record.digest in young:
            recent |= {version for version, c in lineage.candidates.items() if c.round == row.round}
    return needed_blobs(
        lineage.founding,
        lineage.head,
        (*lineage.versions, *lineage.history()),
        lineage.candidates,
        lineage.patches,
        recent,
        lineage.home.key.peer,
    )


def _referred(home: Home, value: str) -> set[Digest]:
    """By a ref's value: objects by digest, and of a training under way all that it needs and an audit may want."""
    found = {Digest(text) for text in _DIGEST.findall(value)}
    for digest in tuple(found):
        with suppress(P2PModelError):
            progress = Progress.decode(home.objects.load(digest, MAX_PROGRESS_BYTES))
            found |= {progress.state, *progress.checkpoints, *progress.states}
            found |= {progress.gradients} if progress.gradients else set()
    return found


def _outlived(lineage: Lineage) -> Iterator[str]:
    """Refs of what a contributor's optimiser learned on versions that no training begins from any more: of each kind
    the one on the head stays, and the nearest before it."""
    prefix = lineage.notes.ref(CONTRIBUTING, "")
    names = lineage.home.refs.names(prefix)
    chain = [v.id for v in reversed(lineage.versions)] + [VersionId(lineage.model)]
    for kind in sorted({name.removeprefix(prefix).partition("/")[0] for name in names}):
        noted = [version for version in chain if f"{prefix}{kind}/{version}" in names]
        ahead = [version for version in noted if version != lineage.head][:1]
        stay = {f"{prefix}{kind}/{version}" for version in (*ahead, lineage.head)}
        yield from (name for name in names if name.startswith(f"{prefix}{kind}/") and name not in stay)
