"""Messages over p2pd's binary streams, between peers that need not be honest.

    u8 tag (0: a value, 1: a refusal) · u32 length · canonical msgpack, or the reason in UTF-8      (little-endian)

Every read and write has a limit in bytes and a deadline; every service a limit on its streams, all and of one peer.
"""

import asyncio
import contextlib
import logging
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId, check_peer
from p2pmodel.domain.ports import Buffer
from p2pmodel.swarm.host import PeerHost
from p2pmodel.wire import canonical

T = TypeVar("T")

MESSAGE_SECONDS = 10.0
OPEN_SECONDS = 5.0
BUSY = "busy"
"""The reason of a service that has no stream free."""

_HEADER = struct.Struct("<BI")
_VALUE, _REFUSAL = 0, 1
_MAX_REASON_BYTES = 256

log = logging.getLogger(__name__)


class Refused(PeerFailed):
    """The peer answered that it will not: `reason` is one of a few words, such as "unknown" or "busy"."""

    def __init__(self, reason: str, peer: PeerId) -> None:
        super().__init__(f"{peer} refused: {reason}.", peer)
        self.reason = reason


class Channel:
    """One stream to `peer`. Everything raises PeerFailed when the peer breaks off or is slower than the deadline."""

    def __init__(self, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer = peer
        self._reader = reader
        self._writer = writer

    async def send(self, value: object, seconds: float = MESSAGE_SECONDS) -> None:
        await self._send(_VALUE, canonical.encode(value), seconds)

    async def refuse(self, reason: str) -> None:
        await self._send(_REFUSAL, reason.encode()[:_MAX_REASON_BYTES], MESSAGE_SECONDS)

    async def receive(self, kind: type[T], limit: int, seconds: float = MESSAGE_SECONDS) -> T:
        """The next message. Raises also Refused, and Rejected when the message is too large or no `kind`."""
        tag, raw = await self._within(seconds, self._read_message(limit))
        if tag == _REFUSAL:
            raise Refused("".join(c for c in raw.decode(errors="replace") if c.isprintable()), self.peer)
        return canonical.decode(raw, kind, limit)

    async def write(self, raw: Buffer, seconds: float = MESSAGE_SECONDS) -> None:
        self._writer.write(raw)
        await self._within(seconds, self._writer.drain())

    async def read(self, at_most: int, seconds: float = MESSAGE_SECONDS) -> bytes:
        """One byte at least. PeerFailed at the stream's end as well."""
        raw = await self._within(seconds, self._reader.read(at_most))
        if not raw:
            raise PeerFailed(f"{self.peer} broke off.", self.peer)
        return raw

    async def wait_closed_by_peer(self, seconds: float = MESSAGE_SECONDS) -> None:
        """Until the peer has closed the stream, having read everything: closing first could lose a tail."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(seconds):
                await self._reader.read(1)

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        """Closes, and drops what is not sent yet."""
        self._writer.transport.abort()

    async def _send(self, tag: int, body: bytes, seconds: float) -> None:
        await self.write(_HEADER.pack(tag, len(body)) + body, seconds)

    async def _read_message(self, limit: int) -> tuple[int, bytes]:
        tag, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
        if tag not in (_VALUE, _REFUSAL) or length > (limit if tag == _VALUE else _MAX_REASON_BYTES):
            raise Rejected("size", f"{self.peer} sent a message that is malformed or too large.")
        return tag, await self._reader.readexactly(length)

    async def _within(self, seconds: float, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            raise PeerFailed(f"{self.peer} was silent for {seconds:.0f} s.", self.peer) from None
        except (asyncio.IncompleteReadError, OSError):
            raise PeerFailed(f"{self.peer} broke off.", self.peer) from None


@contextlib.asynccontextmanager
async def open_channel(host: PeerHost, peer: PeerId, protocol: str) -> AsyncIterator[Channel]:
    """A Channel to the peer's service. Raises PeerFailed."""
    reader, writer = await host.p2p.open_stream(peer, protocol, OPEN_SECONDS)
    channel = Channel(peer, reader, writer)
    try:
        yield channel
    finally:
        channel.close()


class Service:
    """Answers a protocol's streams with `handle`, at most `streams` at once, and `streams_per_peer` of one peer. A
    handler that raises an error of ours refuses with its reason; one that takes longer than `seconds` is cut off."""

    def __init__(
        self,
        host: PeerHost,
        protocol: str,
        handle: Callable[[Channel], Awaitable[None]],
        *,
        streams: int = 64,
        streams_per_peer: int = 8,
        seconds: float | None = 60.0,
    ) -> None:
        self._host = host
        self._protocol = protocol
        self._handle = handle
        self._streams = streams
        self._streams_per_peer = streams_per_peer
        self._seconds = seconds
        self._open: Counter[PeerId] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        await self._host.p2p.add_binary_stream_handler(self._protocol, self._accept)

    async def stop(self) -> None:
        """No stream is open when it returns."""
        with contextlib.suppress(OSError, P2PDaemonError, asyncio.IncompleteReadError):
            await self._host.p2p.remove_binary_stream_handler(self._protocol)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = PeerId(info.peer_id.to_base58())
        channel = Channel(peer, reader, writer)
        busy = self._open.total() >= self._streams or self._open[peer] >= self._streams_per_peer
        self._open[peer] += not busy  # or those that are refused would keep those that come next from being served
        self._tasks.add(task)
        try:
            check_peer(peer, "caller")
            async with asyncio.timeout(self._seconds):
                await (channel.refuse(BUSY) if busy else self._answer(channel))
                await channel.wait_closed_by_peer()
        except (TimeoutError, PeerFailed, ValueError) as error:
            log.debug("%s: stream of %s ended: %s", self._protocol, peer, error)
            channel.abort()
        finally:
            channel.close()
            self._tasks.discard(task)
            self._open[peer] -= not busy
            if not self._open[peer]:
                del self._open[peer]

    async def _answer(self, channel: Channel) -> None:
        try:
            await self._handle(channel)
        except PeerFailed:
            raise
        except P2PModelError as error:
            log.debug("%s: refused %s: %s", self._protocol, channel.peer, error)
            await channel.refuse(error.reason if isinstance(error, Rejected) else "failed")
