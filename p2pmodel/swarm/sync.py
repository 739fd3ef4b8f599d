"""Anti-entropy: what a peer has that we lack. Gossip drops announcements in silence; without this, peers diverge.

    client: Question("missing", model, digest of all digests)  ->  server: Summary(same, checksums of 256 buckets)
    client: Want(buckets that differ)                          ->  server: Listing(entries, buckets covered)   and again
    client: Question("lineages", …)                            ->  server: the offers

A bucket holds the digests that begin with one byte. Two peers that know the same exchange two small messages.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from p2pmodel.domain.announcement import RECORD_KINDS
from p2pmodel.domain.errors import NotFound, PeerFailed
from p2pmodel.domain.ids import Digest, ModelId, PeerId, check_digest
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.swarm import LineageOffer
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.rpc import Channel, Refused, Service, open_channel
from p2pmodel.wire import canonical

PROTOCOL = "p2pmodel/sync/1"
MAX_MISSING = 10_000
"""The most entries that one `missing` returns; the next one returns more."""

MISSING_SECONDS = 30.0
"""For all of one `missing`: no longer than the server itself goes on."""
MAX_LINEAGES = 256
_BUCKETS = 256
_CHECKSUM_BYTES = 16
_MAX_LISTED = 4_000
_SMALL_BYTES = 16 << 10
_LARGE_BYTES = 1 << 20
_NO_MODEL = canonical.digest(b"")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    ask: str
    model: ModelId
    checksum: Digest

    def __post_init__(self) -> None:
        check_digest(self.model, "model")
        check_digest(self.checksum, "checksum")
        if self.ask not in ("missing", "lineages"):
            raise ValueError("nobody answers this question")


@dataclass(frozen=True)
class Summary:
    """`buckets` are 256 checksums in a row, or nothing when there is no difference."""

    same: bool
    buckets: bytes

    def __post_init__(self) -> None:
        if len(self.buckets) != (0 if self.same else _BUCKETS * _CHECKSUM_BYTES):
            raise ValueError("a summary has one checksum a bucket")


@dataclass(frozen=True)
class Want:
    buckets: bytes

    def __post_init__(self) -> None:
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError("the wanted buckets have to be unique and sorted")


@dataclass(frozen=True)
class Entry:
    kind: str
    record: BlobRef


@dataclass(frozen=True)
class Listing:
    """All of the first `covered` buckets that were wanted; the last of them may be cut short."""

    entries: tuple[Entry, ...]
    covered: int

    def __post_init__(self) -> None:
        if len(self.entries) > _MAX_LISTED or self.covered < 1:
            raise ValueError("a listing is too long, or of nothing")


@dataclass(frozen=True)
class Lineages:
    offers: tuple[LineageOffer, ...]

    def __post_init__(self) -> None:
        if len(self.offers) > MAX_LINEAGES:
            raise ValueError("too many lineages")


class SyncServer:
    """`inventory`: all records of a model, by kind; `lineages`: what this peer takes part in."""

    def __init__(
        self,
        host: PeerHost,
        inventory: Callable[[ModelId], Sequence[tuple[str, BlobRef]]],
        lineages: Callable[[], Sequence[LineageOffer]],
    ) -> None:
        self._inventory = inventory
        self._lineages = lineages
        self._service = Service(host, PROTOCOL, self._answer, streams=16, streams_per_peer=2, seconds=30.0)

    async def start(self) -> None:
        await self._service.start()

    async def stop(self) -> None:
        await self._service.stop()

    async def _answer(self, channel: Channel) -> None:
        question = await channel.receive(Question, _SMALL_BYTES)
        if question.ask == "lineages":
            await channel.send(Lineages(tuple(self._lineages())[:MAX_LINEAGES]))
            return
        try:
            inventory = self._inventory(question.model)
        except NotFound:
            await channel.refuse("unknown")
            return
        known = [ref.digest for _, ref in inventory]
        if _checksum(known) == question.checksum:
            await channel.send(Summary(True, b""))
            return
        await channel.send(Summary(False, _bucket_checksums(known)))
        entries: dict[int, list[Entry]] = {}
        for kind, ref in sorted(inventory, key=lambda item: item[1].digest):
            entries.setdefault(_bucket(ref.digest), []).append(Entry(kind, ref))
        for _ in range(_BUCKETS):
            try:
                want = await channel.receive(Want, _SMALL_BYTES)
            except PeerFailed:
                return  # the client has what it wanted, and has closed
            await channel.send(_list(entries, want.buckets))


async def missing(host: PeerHost, peer: PeerId, model: ModelId, known: Collection[Digest]) -> list[tuple[str, BlobRef]]:
    """(record kind, reference) of what the peer has and we lack, sorted by digest, at most MAX_MISSING; nothing when
    the peer does not take part in the model. It is the peer's word: records are checked when they are fetched.

    Raises PeerFailed, also when it takes longer than MISSING_SECONDS in all, and Rejected when it answers nonsense.
    """
    try:
        async with asyncio.timeout(MISSING_SECONDS):
            return await _missing(host, peer, model, set(known))
    except TimeoutError:
        raise PeerFailed(f"{peer} took longer than {MISSING_SECONDS:.0f} s to say what it has.", peer) from None


async def _missing(host: PeerHost, peer: PeerId, model: ModelId, ours: set[Digest]) -> list[tuple[str, BlobRef]]:
    found: dict[Digest, tuple[str, BlobRef]] = {}
    async with open_channel(host, peer, PROTOCOL) as channel:
        await channel.send(Question("missing", model, _checksum(ours)))
        try:
            summary = await channel.receive(Summary, _SMALL_BYTES)
        except Refused as refused:
            if refused.reason == "unknown":
                return []
            raise
        wanted = b"" if summary.same else _different(_bucket_checksums(ours), summary.buckets)
        while wanted and len(found) < MAX_MISSING:
            await channel.send(Want(wanted))
            listing = await channel.receive(Listing, _LARGE_BYTES)
            for entry in listing.entries:
                if entry.kind in RECORD_KINDS and entry.record.digest not in ours:
                    found[entry.record.digest] = (entry.kind, entry.record)
            wanted = wanted[listing.covered :]
    return [found[digest] for digest in sorted(found)[:MAX_MISSING]]


async def lineages(host: PeerHost, peer: PeerId) -> list[LineageOffer]:
    """The lineages that the peer takes part in. Raises PeerFailed, and Rejected when it answers nonsense."""
    async with open_channel(host, peer, PROTOCOL) as channel:
        await channel.send(Question("lineages", _NO_MODEL, _NO_MODEL))
        return list((await channel.receive(Lineages, _LARGE_BYTES)).offers)


def _list(entries: dict[int, list[Entry]], wanted: bytes) -> Listing:
    """Whole buckets, as many as fit; the first one in any case."""
    listed: list[Entry] = []
    for covered, bucket in enumerate(wanted):
        more = entries.get(bucket, [])
        if covered and len(listed) + len(more) > _MAX_LISTED:
            return Listing(tuple(listed), covered)
        listed += more[:_MAX_LISTED]
    return Listing(tuple(listed), len(wanted))


def _bucket(digest: Digest) -> int:
    return int(digest[:2], 16)


def _checksum(digests: Iterable[Digest]) -> Digest:
    return canonical.digest("".join(sorted(set(digests))).encode())


def _bucket_checksums(digests: Iterable[Digest]) -> bytes:
    hashes = [hashlib.sha256() for _ in range(_BUCKETS)]
    for digest in sorted(set(digests)):
        hashes[_bucket(digest)].update(digest.encode())
    return b"".join(some.digest()[:_CHECKSUM_BYTES] for some in hashes)


def _different(ours: bytes, theirs: bytes) -> bytes:
    size = _CHECKSUM_BYTES
    return bytes(n for n in range(_BUCKETS) if ours[n * size :][:size] != theirs[n * size :][:size])
