"""Frames of the activation streams: a fixed header, a small msgpack map, and a body of raw tensor bytes.

    u8 kind · u8 reserved · u16 meta length · u32 body length · u32 position · u32 tokens      (little-endian, 16 bytes)

position: of the body's first token in the session; tokens: how many the body holds. A decode step has an empty meta, so
that a token costs no parsing. In a session that trains, position is the number of the micro-batch.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

from p2pmodel.domain.errors import Rejected

HEADER = struct.Struct("<BBHIII")
MAX_META_BYTES = 60_000
MAX_BODY_BYTES = 64 << 20


class Kind(IntEnum):
    OPEN = 1  # meta: SessionRequest and the rest of the route; the first frame on every stream
    DATA = 2  # body: encoded hidden states
    CLOSE = 3  # there is no half-close on these streams: the end is said
    ERROR = 4  # meta: why a stage gave up; runs on to the client
    PING = 5  # answered off the compute thread
    PONG = 6
    STATE = 7  # body: a blob of slot tensors, the session's own from here on; every stage hands it on
    GRADIENT = 8  # body: gradients of a DATA frame's answer; from the client into its sink, and back along the route


WITH_BODY = frozenset({Kind.DATA, Kind.STATE, Kind.GRADIENT})


class Header(NamedTuple):
    kind: Kind
    meta: int
    body: int
    position: int
    tokens: int


def pack(kind: Kind, meta: bytes = b"", body_length: int = 0, position: int = 0, tokens: int = 0) -> bytes:
    """The header and the meta; the body follows as it is, never copied."""
    return HEADER.pack(kind, 0, len(meta), body_length, position, tokens) + meta


def parse(raw: bytes | bytearray | memoryview) -> Header:
    """Of the first HEADER.size bytes. Raises Rejected("frame") before anything is allocated for a frame too large."""
    kind, reserved, meta, body, position, tokens = HEADER.unpack_from(raw)
    if kind not in Kind.__members__.values() or reserved or meta > MAX_META_BYTES or body > MAX_BODY_BYTES:
        raise Rejected("frame", "A peer sent a frame that is malformed or too large.")
    return Header(Kind(kind), meta, body, position, tokens)
