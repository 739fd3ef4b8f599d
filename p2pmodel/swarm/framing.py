"""Frames over sockets: reading without a copy of a body, writing without ever blocking the writer."""

import mmap
import socket
import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ports import Buffer
from p2pmodel.wire import frames
from p2pmodel.wire.frames import HEADER, Header, Kind

SCRATCH_BYTES = 64 << 10
LAZY_BYTES = 256 << 10
"""Bodies from this size on lie in fresh pages, which cost memory only as their bytes arrive: a header claims none."""
_PARTS_A_CALL = 16


class Frame(NamedTuple):
    """`body` is writable, its own, and stays valid for as long as someone refers to it."""

    kind: Kind
    meta: bytes
    body: bytearray | memoryview
    position: int
    tokens: int


class FrameReader:
    """Cuts one socket's bytes into frames. most: bytes of the largest body that is taken."""

    def __init__(self, most: int = frames.MAX_BODY_BYTES) -> None:
        self.most = most
        self._partial = bytearray()
        self._head: tuple[Header, bytes, bytearray | memoryview] | None = None
        self._rest = memoryview(b"")
        self.received = 0

    @property
    def held(self) -> int:
        """Bytes of a frame that is not whole yet."""
        if self._head is None:
            return len(self._partial)
        return len(self._head[2]) - len(self._rest)

    def read(self, stream: socket.socket, scratch: memoryview) -> list[Frame]:
        """What one `recv` completes. `scratch` holds what is read until this returns; readers of a thread share it.

        Raises EOFError at the end of the stream, Rejected for a malformed frame, BlockingIOError and other OSErrors.
        """
        if self._head is None:
            count = stream.recv_into(scratch)
            if not count:
                raise EOFError
            self.received += count
            return self._cut(scratch[:count])
        count = stream.recv_into(self._rest)
        if not count:
            raise EOFError
        self.received += count
        self._rest = self._rest[count:]
        if self._rest:
            return []
        (header, meta, body), self._head = self._head, None
        return [Frame(header.kind, meta, body, header.position, header.tokens)]

    def _cut(self, data: memoryview) -> list[Frame]:
        if self._partial:
            self._partial += data
            data, self._partial = memoryview(self._partial), bytearray()
        done: list[Frame] = []
        while len(data) >= HEADER.size:
            header = parse(data)
            if header.body > self.most:
                raise Rejected("frame", f"A peer sent a body of {header.body} bytes where {self.most} are the most.")
            start = HEADER.size + header.meta
            if len(data) < start:
                break
            meta = bytes(data[HEADER.size : start])
            body = _room(header.body)
            have = min(len(data) - start, header.body)
            body[:have] = data[start : start + have]
            data = data[start + have :]
            if have < header.body:
                self._head, self._rest = (header, meta, body), memoryview(body)[have:]
                return done
            done.append(Frame(header.kind, meta, body, header.position, header.tokens))
        self._partial = bytearray(data)
        return done


class Outbox:
    """What could not be sent at once, in order. `size`: bytes that wait; `sent`: bytes that the socket has taken."""

    def __init__(self) -> None:
        self._parts: deque[memoryview] = deque()
        self.size = 0
        self.sent = 0

    def put(self, frame: bytes) -> None:
        """A frame without a body."""
        self._parts.append(memoryview(frame))
        self.size += len(frame)

    def put_data(self, body: Buffer, position: int, tokens: int, meta: bytes, kind: Kind = Kind.DATA) -> None:
        """A frame with a body, which is sent from where it lies, so it must not change any more.

        Raises TypeError unless the body is contiguous, Rejected("frame") when it or the meta is too large.
        """
        size = memoryview(body).nbytes
        if size > frames.MAX_BODY_BYTES or len(meta) > frames.MAX_META_BYTES:
            raise Rejected("frame", f"A body of {size} bytes with a meta of {len(meta)} does not fit into a frame.")
        self.put(frames.pack(kind, meta, size, position, tokens))
        if size:
            self._parts.append(memoryview(body).cast("B"))
            self.size += size

    def flush(self, stream: socket.socket) -> None:
        """Sends what the socket takes without blocking. What the other end will not take any more is dropped: whoever
        reads from the socket learns why."""
        parts = self._parts
        while parts:
            try:
                count = stream.sendmsg(islice(parts, _PARTS_A_CALL))
            except BlockingIOError:
                return
            except OSError:
                parts.clear()
                self.size = 0
                return
            self.size -= count
            self.sent += count
            while parts and count >= len(parts[0]):
                count -= len(parts.popleft())
            if count:
                parts[0] = parts[0][count:]


def parse(raw: bytes | bytearray | memoryview) -> Header:
    """Of a frame's first bytes. Raises Rejected("frame")."""
    header = frames.parse(raw)
    if header.body and header.kind not in frames.WITH_BODY:
        raise Rejected("frame", "A peer sent a frame with a body where there is none.")
    return header


def receive_frame(stream: socket.socket, timeout: float) -> Frame:
    """One frame without a body, reading nothing beyond it; blocking, and for `timeout` seconds in all.

    Raises TimeoutError, EOFError, OSError, Rejected("frame").
    """
    deadline = time.monotonic() + timeout
    header = parse(_exactly(stream, HEADER.size, deadline))
    if header.body:
        raise Rejected("frame", "A peer sent data before the session was open.")
    meta = bytes(_exactly(stream, header.meta, deadline))
    return Frame(header.kind, meta, bytearray(), header.position, header.tokens)


def _exactly(stream: socket.socket, count: int, deadline: float) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        stream.settimeout(left)
        got = stream.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


def _room(size: int) -> bytearray | memoryview:
    if size < LAZY_BYTES:
        return bytearray(size)
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
