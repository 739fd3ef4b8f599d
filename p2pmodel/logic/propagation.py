"""What this node has heard of and does not have yet: records and blobs to fetch, and from whom.

Gossip and anti-entropy both end here. The backlog is bounded in all that strangers can make it hold, and nobody can
crowd others out: a peer may be the first to name at most `max_each` of the entries, and serves at most `slots_each`
fetches at once. An entry stays until it is done or nobody is left who has it; a holder that does not answer is tried
again after a growing delay, since it may be back.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from p2pmodel.domain.announcement import RECORD_KINDS
from p2pmodel.domain.ids import Digest, PeerId


@dataclass(frozen=True)
class BacklogRules:
    max_entries: int = 4096
    max_each: int = 512
    max_holders: int = 8
    slots_each: int = 2
    first_delay: float = 1.0
    longest_delay: float = 300.0


class Wanted(NamedTuple):
    """holders: those who said that they have it, the next to be asked first; named_by: the first of them; after: not to
    be tried before; asking: who is being asked now."""

    digest: Digest
    kind: str
    size: int
    named_by: PeerId
    holders: tuple[PeerId, ...]
    order: int
    failures: int = 0
    after: float = 0.0
    asking: PeerId | None = None


@dataclass(frozen=True)
class Backlog:
    """named: how many of the entries each peer was the first to name; heard: entries ever made."""

    rules: BacklogRules = field(default_factory=BacklogRules)
    entries: Mapping[Digest, Wanted] = field(default_factory=dict)
    named: Mapping[PeerId, int] = field(default_factory=dict)
    heard: int = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self.entries


@dataclass(frozen=True)
class Fetch:
    """Get `size` bytes by `digest` from `holder`; then call `done` or `failed`."""

    digest: Digest
    kind: str
    size: int
    holder: PeerId


def want(backlog: Backlog, digest: Digest, kind: str, holder: PeerId, size: int, now: float) -> Backlog:
    """`holder` says that it has what we lack. Unchanged when that is known, or there is no room: anti-entropy will name
    it again. In a full backlog a new entry takes the place of the one that failed most often."""
    rules = backlog.rules
    entry = backlog.entries.get(digest)
    if entry is not None:
        full = len(entry.holders) >= rules.max_holders
        if holder in entry.holders or (full and not entry.failures):
            return backlog
        # One who has not failed yet goes first, and at once: the delay was for the others. The last has just failed.
        kept = entry.holders[:-1] if full else entry.holders
        holders = (holder, *kept) if entry.failures else (*kept, holder)
        return _put(backlog, entry._replace(holders=holders, after=min(entry.after, now)))
    if backlog.named.get(holder, 0) >= rules.max_each:
        return backlog
    if len(backlog) >= rules.max_entries:
        idle = [known for known in backlog.entries.values() if known.failures and known.asking is None]
        if not idle:
            return backlog
        backlog = done(backlog, max(idle, key=lambda known: (known.failures, known.order)).digest)
    new = Wanted(digest, kind, size, holder, (holder,), backlog.heard, after=now)
    named = {**backlog.named, holder: backlog.named.get(holder, 0) + 1}
    return Backlog(rules, {**backlog.entries, digest: new}, named, backlog.heard + 1)


def due(backlog: Backlog, now: float, slots: int) -> tuple[Backlog, tuple[Fetch, ...]]:
    """The fetches to begin now, so that at most `slots` run at once, those under way included.

    Verdicts before candidates before patches before all else, because the small decide about the large; then in the
    order in which they were heard of, one from each holder in turn.
    """
    ready: list[Wanted] = []
    busy: dict[PeerId, int] = {}
    free = slots
    for entry in backlog.entries.values():
        if entry.asking is not None:
            busy[entry.asking] = busy.get(entry.asking, 0) + 1
            free -= 1
        elif entry.after <= now:
            ready.append(entry)
    if free <= 0 or not ready:
        return backlog, ()
    if len(ready) > 1:
        ready.sort(key=lambda entry: (_urgency(entry.kind), entry.order))
    fetches: list[Fetch] = []
    entries = dict(backlog.entries)
    for load in range(backlog.rules.slots_each):
        left: list[Wanted] = []
        for entry in ready:
            holder = next((peer for peer in entry.holders if busy.get(peer, 0) <= load), None)
            if holder is None or len(fetches) == free:
                left.append(entry)
                continue
            busy[holder] = busy.get(holder, 0) + 1
            entries[entry.digest] = entry._replace(asking=holder)
            fetches.append(Fetch(entry.digest, entry.kind, entry.size, holder))
        if not left:
            break
        ready = left
    return (_with(backlog, entries) if fetches else backlog), tuple(fetches)


def sources(backlog: Backlog, fetch: Fetch) -> tuple[PeerId, ...]:
    """Who is asked for it: the fetch's holder, and where that breaks off all others who said that they have it."""
    entry = backlog.entries.get(fetch.digest)
    others = () if entry is None else tuple(peer for peer in entry.holders if peer != fetch.holder)
    return (fetch.holder, *others)


def done(backlog: Backlog, digest: Digest) -> Backlog:
    """It is here, however it came, or it is no longer wanted."""
    entries = dict(backlog.entries)
    entry = entries.pop(digest, None)
    if entry is None:
        return backlog
    named = {**backlog.named, entry.named_by: backlog.named[entry.named_by] - 1}
    if not named[entry.named_by]:
        del named[entry.named_by]
    return Backlog(backlog.rules, entries, named, backlog.heard)


def failed(backlog: Backlog, digest: Digest, holder: PeerId, now: float, *, has_not: bool = False) -> Backlog:
    """The fetch from `holder` came to nothing. has_not: it said that it does not have it, or sent something else, and
    is not asked for it again; an entry that nobody else has is forgotten."""
    entry = backlog.entries.get(digest)
    if entry is None or entry.asking != holder:
        return backlog
    others = tuple(peer for peer in entry.holders if peer != holder)
    holders = others if has_not else (*others, holder)
    if not holders:
        return done(backlog, digest)
    # A delay once all holders have been tried: until then the next one is asked at once.
    failures = entry.failures + 1
    rounds = failures // len(entry.holders)
    fresh = failures % len(entry.holders) != 0
    delay = 0.0 if fresh else min(backlog.rules.longest_delay, backlog.rules.first_delay * 2.0 ** min(rounds - 1, 60))
    return _put(backlog, entry._replace(holders=holders, failures=failures, after=now + delay, asking=None))


def stir(backlog: Backlog, digests: Collection[Digest], now: float) -> Backlog:
    """What these failed for may have come: they are due at once, and their delays begin anew."""
    entries = dict(backlog.entries)
    for digest in digests:
        entry = entries.get(digest)
        if entry is not None:
            entries[digest] = entry._replace(failures=0, after=min(entry.after, now))
    return replace(backlog, entries=entries)


def next_due(backlog: Backlog) -> float | None:
    """When `due` is worth calling again if nothing happens before; None when nothing waits."""
    soonest: float | None = None
    for entry in backlog.entries.values():
        if entry.asking is None and (soonest is None or entry.after < soonest):
            soonest = entry.after
    return soonest


def _put(backlog: Backlog, entry: Wanted) -> Backlog:
    return _with(backlog, {**backlog.entries, entry.digest: entry})


def _with(backlog: Backlog, entries: Mapping[Digest, Wanted]) -> Backlog:
    return Backlog(backlog.rules, entries, backlog.named, backlog.heard)


def _urgency(kind: str) -> int:
    """The kinds of RECORD_KINDS last to first, then the others."""
    return -RECORD_KINDS.index(kind) if kind in RECORD_KINDS else 1
