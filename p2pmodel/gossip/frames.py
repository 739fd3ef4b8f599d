"""What the node and its gossip child say to each other: msgpack behind a length, over a socketpair.

    u32 length · msgpack map        (little-endian; at most MAX_FRAME_BYTES)

Both ends are ours, but the child parses the network's bytes: the node bounds and checks what the child sends.
"""

import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, TypeVar

import msgspec

from p2pmodel.domain.errors import Rejected

MAX_FRAME_BYTES = 256 << 10
LENGTH = struct.Struct("<I")

T = TypeVar("T")


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first frame. key: the child's Ed25519 private key in libp2p's format; listen: the multiaddr to listen on;
    psk: 32 bytes that every connection needs, or none."""

    key: bytes
    listen: str
    psk: bytes = b""


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    model: str


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Full multiaddrs that the child keeps a connection to."""

    addresses: tuple[str, ...]


class Publish(msgspec.Struct, frozen=True, tag=True):
    number: int
    model: str
    data: bytes


class Ready(msgspec.Struct, frozen=True, tag=True):
    peer: str
    addresses: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The child cannot start; it ends after this frame. busy: the port is taken."""

    busy: bool
    message: str


class Published(msgspec.Struct, frozen=True, tag=True):
    """Answers the Publish of that number. refusal: a reason of wire.records, or empty when the record went out."""

    number: int
    refusal: str


class Received(msgspec.Struct, frozen=True, tag=True):
    """A valid announcement of another peer."""

    data: bytes


class Status(msgspec.Struct, frozen=True, tag=True):
    """Of this child since it started. peers: with an open GossipSub stream; refused: messages by reason."""

    peers: int
    refused: dict[str, int]


ToChild = Start | Subscribe | Connect | Publish
FromChild = Ready | Failed | Published | Received | Status

_encoder = msgspec.msgpack.Encoder()


def encode(message: ToChild | FromChild) -> bytes:
    """Raises ValueError when the message is over MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


class FrameBuffer(Generic[T]):
    """Cuts a byte stream into messages; holds at most one unfinished frame."""

    def __init__(self, messages: object) -> None:
        """messages: the union of the types that may arrive (`ToChild` or `FromChild`)."""
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._buffer = bytearray()

    def feed(self, raw: bytes) -> Iterator[T]:
        """The messages that `raw` completes. Raises Rejected("frame") for one too large or of no known type."""
        self._buffer += raw
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise Rejected("frame", f"A gossip frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}.")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            try:
                message: T = self._decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise Rejected("frame", f"A gossip frame cannot be understood: {error}.") from None
            yield message


class Incoming(Generic[T]):
    """Messages one by one, from whatever receives bytes."""

    def __init__(self, receive: Callable[[], Awaitable[bytes]], messages: object) -> None:
        """receive: some bytes, or none at the end; messages: as for FrameBuffer."""
        self._receive = receive
        self._buffer: FrameBuffer[T] = FrameBuffer(messages)
        self._ready: deque[T] = deque()

    async def next(self) -> T | None:
        """None at the end. Raises Rejected("frame")."""
        while not self._ready:
            raw = await self._receive()
            if not raw:
                return None
            self._ready.extend(self._buffer.feed(raw))
        return self._ready.popleft()
