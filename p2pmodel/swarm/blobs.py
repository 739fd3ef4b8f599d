"""Blobs by digest, over p2pd's binary streams.

The client asks for a digest from an offset on; the server answers with the blob's size, and then its bytes.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TypeVar

from p2pmodel.domain.errors import Busy, P2PModelError, PeerFailed, Rejected, Unreachable
from p2pmodel.domain.ids import Digest, PeerId, check_digest, short
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.ports import BlobSource, MakeSink
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.rpc import BUSY, Channel, Refused, Service, open_channel

T = TypeVar("T")

PROTOCOL = "p2pmodel/blob/1"
CHUNK_BYTES = 256 << 10
STALL_SECONDS = 10.0
SLOWEST_BYTES_PER_SECOND = 32 << 10
"""A transfer slower than this on the whole is broken off by both sides: a trickle of bytes holds no stream for long."""

MAX_BREAKS = 64
"""So often is a transfer taken up, from whichever source."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 8.0
"""Between two attempts with sources that are busy; it doubles, and is up to half as long again."""

_MAX_MESSAGE_BYTES = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlobRequest:
    digest: Digest
    offset: int

    def __post_init__(self) -> None:
        check_digest(self.digest, "requested digest")
        if self.offset < 0:
            raise ValueError("the offset is negative")


@dataclass(frozen=True)
class BlobHeader:
    """`size` of the whole blob: as many bytes follow, less the offset."""

    size: int


class BlobServer:
    """Serves what `source` has and `may_serve` allows. `bytes_sent` counts bodies only, `sent` whole ones."""

    def __init__(
        self, host: PeerHost, source: BlobSource, may_serve: Callable[[Digest], bool] = lambda digest: True
    ) -> None:
        self.bytes_sent = self.sent = 0
        self._source = source
        self._may_serve = may_serve
        self._service = Service(host, PROTOCOL, self._serve, seconds=None)

    async def start(self) -> None:
        await self._service.start()

    async def stop(self) -> None:
        await self._service.stop()

    async def _serve(self, channel: Channel) -> None:
        request = await channel.receive(BlobRequest, _MAX_MESSAGE_BYTES)
        size = self._source.size(request.digest) if self._may_serve(request.digest) else None
        if size is None or request.offset > size:
            await channel.refuse("unknown")
            return
        await channel.send(BlobHeader(size))
        async with asyncio.timeout(_patience(size - request.offset)):
            for at in range(request.offset, size, CHUNK_BYTES):
                try:
                    chunk = await asyncio.to_thread(self._source.read, request.digest, at, min(CHUNK_BYTES, size - at))
                except (P2PModelError, OSError) as error:
                    log.warning("Blob %s cannot be read: %s", short(request.digest), error)
                    channel.abort()  # after the header, a refusal would be taken for the blob's bytes
                    return
                await channel.write(chunk, STALL_SECONDS)
                self.bytes_sent += len(chunk)
        self.sent += 1


class BlobFetcher:
    """Fetches blobs into the sinks that `make_sink` makes. `bytes_received` counts bodies, wrong ones too; `received`
    those that were right."""

    def __init__(self, host: PeerHost, make_sink: MakeSink, *, patience: float = 0.0) -> None:
        """patience: seconds for which sources that are busy are asked again."""
        self.bytes_received = self.received = 0
        self._host = host
        self._make_sink = make_sink
        self._seconds = patience

    async def fetch(self, ref: BlobRef, sources: Sequence[PeerId]) -> None:
        """Returns when the blob is verified and visible. Sources are tried in turn, each from the byte where the one
        before broke off, and again while that brings more than a trickle; if what they sent together is wrong, each
        alone, since one liar spoils the others' bytes.

        Raises Busy when one that may have it has no stream free now, Unreachable when none of them has it, whole and
        right; StorageError from the sink.
        """
        await self._patiently(lambda: self._fetch(ref, sources))

    async def _fetch(self, ref: BlobRef, sources: Sequence[PeerId]) -> None:
        busy: set[PeerId] = set()
        candidates = list(dict.fromkeys(source for source in sources if source != self._host.peer))
        liars = await self._attempt(ref, candidates, busy)
        if liars is None:
            return
        for source in candidates if liars else ():
            if liars != {source} and await self._attempt(ref, [source], busy) is None:
                return
        if busy:
            raise _busy(ref.digest, len(busy), len(candidates))
        raise Unreachable(
            f"Blob {short(ref.digest)} of {ref.size} bytes cannot be had from any of {len(candidates)} peers.",
            "Try again when more peers are there.",
        )

    async def describe(self, digest: Digest, limit: int, sources: Sequence[PeerId]) -> BlobRef:
        """With the size that the first source says it has, for digests that came without one. Raises Rejected("size")
        when that is over `limit` bytes, Busy, and Unreachable when no source has it."""
        return await self._patiently(lambda: self._describe(digest, limit, sources))

    async def _describe(self, digest: Digest, limit: int, sources: Sequence[PeerId]) -> BlobRef:
        busy: set[PeerId] = set()
        candidates = list(dict.fromkeys(source for source in sources if source != self._host.peer))
        for source in candidates:
            try:
                async with open_channel(self._host, source, PROTOCOL) as channel:
                    await channel.send(BlobRequest(digest, 0))
                    header = await channel.receive(BlobHeader, _MAX_MESSAGE_BYTES, STALL_SECONDS)
            except (PeerFailed, Rejected) as error:
                log.info("Blob %s: %s", short(digest), error)
                if _is_busy(error):
                    busy.add(source)
                continue
            if not 0 <= header.size <= limit:
                raise Rejected("size", f"Blob {short(digest)} has {header.size} bytes, and at most {limit} are taken.")
            return BlobRef(digest, header.size)
        if busy:
            raise _busy(digest, len(busy), len(candidates))
        raise Unreachable(f"Blob {short(digest)} cannot be had from any of these peers.", "Try again later.")

    async def _attempt(self, ref: BlobRef, sources: Sequence[PeerId], busy: set[PeerId]) -> set[PeerId] | None:
        """None when the blob is there; else the peers whose bytes make up a wrong one: none when it is incomplete.
        Those that say that they are busy are added to `busy`."""
        sink = self._make_sink(ref.digest, ref.size)
        received, contributors, fruitless = 0, set[PeerId](), 0
        try:
            for source in islice(cycle(sources), MAX_BREAKS):
                if received == ref.size or fruitless == len(sources):
                    break
                before = received
                try:
                    async with open_channel(self._host, source, PROTOCOL) as channel:
                        async for chunk in self._chunks(channel, ref, received):
                            await _to_the_end(partial(sink.write, chunk))
                            received += len(chunk)
                except (PeerFailed, Rejected) as error:
                    log.info("Blob %s: %s", short(ref.digest), error)
                    if _is_busy(error):
                        busy.add(source)
                fruitless = 0 if received - before >= CHUNK_BYTES else fruitless + 1
                if received > before:
                    contributors.add(source)
            if received == ref.size:
                await _to_the_end(sink.finish)
                self.received += 1
                return None
        except Rejected as error:
            log.warning("Blob %s of %s: %s", short(ref.digest), ", ".join(sorted(contributors)), error)
            sink.abort()
            return contributors
        except BaseException:
            sink.abort()
            raise
        sink.abort()
        return set()

    async def _chunks(self, channel: Channel, ref: BlobRef, offset: int) -> AsyncIterator[bytes]:
        """Pieces of about CHUNK_BYTES; what came before a failure is yielded before it is raised."""
        await channel.send(BlobRequest(ref.digest, offset))
        header = await channel.receive(BlobHeader, _MAX_MESSAGE_BYTES, STALL_SECONDS)
        if header.size != ref.size:
            raise PeerFailed(f"{channel.peer} has {header.size} bytes instead of {ref.size}.", channel.peer)
        missing, piece, failure = ref.size - offset, bytearray(), None
        give_up = asyncio.get_running_loop().time() + _patience(missing)
        while missing and failure is None:
            seconds = min(STALL_SECONDS, give_up - asyncio.get_running_loop().time())
            try:
                piece += (chunk := await channel.read(min(missing, CHUNK_BYTES - len(piece)), seconds))
                missing -= len(chunk)
                self.bytes_received += len(chunk)
            except PeerFailed as error:
                failure = error
            if piece and (len(piece) == CHUNK_BYTES or failure or not missing):
                yield bytes(piece)
                piece.clear()
        if failure:
            raise failure

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        clock, pause = asyncio.get_running_loop().time, FIRST_PAUSE_SECONDS
        give_up = clock() + self._seconds
        while True:
            try:
                return await work()
            except Busy:
                seconds = pause * random.uniform(1.0, 1.5)
                if clock() + seconds > give_up:
                    raise
            await asyncio.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _is_busy(error: P2PModelError) -> bool:
    return isinstance(error, Refused) and error.reason == BUSY


def _busy(digest: Digest, busy: int, peers: int) -> Busy:
    return Busy(
        f"Blob {short(digest)} cannot be had now: {busy} of {peers} peers that may have it are busy.",
        "Try again in a while.",
    )


def _patience(size: int) -> float:
    return STALL_SECONDS + size / SLOWEST_BYTES_PER_SECOND


async def _to_the_end(work: Callable[[], None]) -> None:
    """Runs it in a thread, and waits for it even when cancelled: nobody else may touch a sink that is being written."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
