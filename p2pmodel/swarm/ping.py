"""Is a peer there, how far is it, and does its compute thread still turn? Answered by a thread that does nothing else.

A PING's meta may name a session. A PONG's position is how long the running step has taken so far, in milliseconds; its
tokens the number of sessions; its meta what has become of the session that was named, and the time.
"""

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.logic.vigil import Progress
from p2pmodel.swarm.framing import SCRATCH_BYTES, FrameReader, receive_frame
from p2pmodel.swarm.opening import lost
from p2pmodel.swarm.streams import Host, Listener, open_stream
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind

PING = "p2pmodel/ping/1"
MAX_PINGERS = 64
MAX_PROBES = 64
"""At once: with fewer than a route has hops, silent ones would delay the others."""
STREAM_SECONDS = 30.0
MAX_NAME_BYTES = 64
MAX_BUSY_MILLISECONDS = (1 << 32) - 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """busy_seconds: age of the step that runs now, 0 if none does; sessions: open at the peer; progress: of the session
    that was asked about, once for each of its hops that this peer is, in order."""

    busy_seconds: float
    sessions: int
    progress: tuple[Progress, ...] = ()


@dataclass(frozen=True)
class Pong(State):
    """seconds: round trip; clock_offset: seconds that the peer's clock is ahead of this one's."""

    seconds: float = 0.0
    clock_offset: float = 0.0


@dataclass(frozen=True)
class Whereabouts:
    """The meta of a PONG. clock: seconds since the epoch, as the peer has it."""

    progress: tuple[Progress, ...]
    clock: float

    def __post_init__(self) -> None:
        if not isfinite(self.clock):
            raise ValueError("a clock has to be finite")


class _Pinger(NamedTuple):
    """A stream that pings come on, until when."""

    peer: PeerId
    reader: FrameReader
    until: float


class PingResponder:
    """`state` is asked about a session, or none (""), at every ping, so it must not wait for anything."""

    def __init__(self, host: Host, state: Callable[[str], State]) -> None:
        self._host, self._state = host, state
        self._listener: Listener | None = None
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._streams: dict[socket.socket, _Pinger] = {}
        self._fresh: queue.SimpleQueue[tuple[socket.socket, PeerId]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._listener = Listener(self._host, PING)
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        accepting = threading.Thread(target=self._accept, args=(self._listener,), name="ping-accept", daemon=True)
        answering = threading.Thread(target=self._answer, name="ping", daemon=True)
        self._threads = [accepting, answering]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        accepting, answering = self._threads
        accepting.join()
        self._waker.close()
        answering.join()

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                self._fresh.put(listener.accept())
            except EOFError:
                return
            with contextlib.suppress(BlockingIOError):  # then it is being woken already
                self._waker.send(b"\0")

    def _answer(self) -> None:
        while self._woken_or_silent():
            now = time.monotonic()
            for stream in [s for s, pinger in self._streams.items() if pinger.until < now]:
                self._drop(stream)
        for stream in list(self._streams):
            self._drop(stream)
        while not self._fresh.empty():
            self._fresh.get()[0].close()
        self._selector.close()
        self._wake.close()

    def _woken_or_silent(self) -> bool:
        """Whether to go on."""
        for key, _ in self._selector.select(1.0):
            if key.fileobj is not self._wake:
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj in self._streams:  # or it has just made room
                    self._pong(key.fileobj)
            elif not self._wake.recv(4096):
                return False
            while not self._fresh.empty():
                self._enter(*self._fresh.get())
        return True

    def _enter(self, stream: socket.socket, peer: PeerId) -> None:
        """Where there is no room, whoever has most streams gives up the oldest of them."""
        if len(self._streams) >= MAX_PINGERS:
            by_peer = Counter(pinger.peer for pinger in self._streams.values())
            self._drop(max(self._streams, key=lambda held: by_peer[self._streams[held].peer]))  # of equals, the oldest
        stream.setblocking(False)
        self._streams[stream] = _Pinger(peer, FrameReader(0), time.monotonic() + STREAM_SECONDS)
        self._selector.register(stream, selectors.EVENT_READ)

    def _pong(self, stream: socket.socket) -> None:
        reader = self._streams[stream].reader
        try:
            for frame in reader.read(stream, self._scratch):
                if frame.kind is not Kind.PING or len(frame.meta) > MAX_NAME_BYTES:
                    raise Rejected("frame", "Only pings are answered here.")
                state = self._state(frame.meta.decode("ascii", "replace"))
                meta = canonical.encode(Whereabouts(state.progress, time.time()))
                busy = min(int(state.busy_seconds * 1000), MAX_BUSY_MILLISECONDS)
                stream.send(frames.pack(Kind.PONG, meta, position=busy, tokens=state.sessions))
        except (OSError, EOFError, Rejected):
            self._drop(stream)

    def _drop(self, stream: socket.socket) -> None:
        del self._streams[stream]
        self._selector.unregister(stream)
        stream.close()


def probe(host: Host, peer: PeerId, timeout: float = 2.0, session: str = "", pings: int = 2) -> Pong:
    """Pings on a stream of their own; the first one also pays for the stream's handshake, so the fastest one counts.

    Raises PeerFailed when no answer comes within `timeout`, Unreachable when this node's daemon is gone.
    """
    deadline = time.monotonic() + timeout
    seconds, offset = float("inf"), 0.0
    with open_stream(host, peer, PING, timeout) as stream:
        try:
            for _ in range(pings):
                began = time.monotonic()
                stream.sendall(frames.pack(Kind.PING, session.encode()))
                pong = receive_frame(stream, deadline - began)
                took, now = time.monotonic() - began, time.time()
                if pong.kind is not Kind.PONG:
                    raise Rejected("frame", "A ping is answered by a pong.")
                found = canonical.decode(pong.meta, Whereabouts, frames.MAX_META_BYTES)
                if took < seconds:
                    seconds, offset = took, found.clock - (now - took / 2)
        except TimeoutError:
            raise PeerFailed(f"Peer …{peer[-8:]} did not answer a ping within {timeout:g} s.", peer) from None
        except (OSError, EOFError):
            raise lost(peer) from None
        except Rejected:
            raise PeerFailed(f"Peer …{peer[-8:]} answered a ping with something else.", peer) from None
    return Pong(pong.position / 1000, pong.tokens, found.progress, seconds, offset)


def probe_all(
    host: Host, peers: Iterable[PeerId], timeout: float, session: str = "", pings: int = 2
) -> dict[PeerId, Pong | None]:
    """All at the same time; None for a peer that does not answer."""

    def one(peer: PeerId) -> Pong | None:
        try:
            return probe(host, peer, timeout, session, pings)
        except (P2PModelError, OSError) as error:
            log.debug("no pong from %s: %s", peer, error)
            return None

    unique = list(dict.fromkeys(peers))
    with ThreadPoolExecutor(min(len(unique), MAX_PROBES), "probe") as pool:
        return dict(zip(unique, pool.map(one, unique), strict=True))
