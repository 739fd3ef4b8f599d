"""The client's end of a chain: what it sends goes to the first stage, what the last one computed comes back on a sink.
Gradients go the other way round: into the sink, and they come back from the first stage.

Both sockets are watched at all times, since either may bring the news of a failure. Who is to blame is taken from an
ERROR frame where one arrives, from the order of events where not, and by pings when nothing happens for a second.
"""

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import Route
from p2pmodel.swarm.framing import SCRATCH_BYTES, Frame, FrameReader, Outbox
from p2pmodel.swarm.opening import Failure, lost
from p2pmodel.swarm.watch import SILENCE_SECONDS, Watch
from p2pmodel.wire import frames
from p2pmodel.wire.frames import Kind

GRACE_SECONDS = 0.25
"""After one side has closed, for the other one to say why: the news travels along the chain."""
CLOSE_SECONDS = 0.5

_CAME = select.POLLIN | select.POLLHUP | select.POLLERR


class ChainSession:
    """One thread at a time steps, sends and receives; `close` may come from any. After an error it is closed."""

    def __init__(
        self,
        name: str,
        route: Route,
        out: socket.socket,
        sink: socket.socket,
        watch: Callable[[Callable[[], tuple[int, int]]], Watch],
        diagnose: Callable[[float], P2PModelError],
    ) -> None:
        """`watch` begins to ping, given what tells how many frames and gradients were sent; `diagnose` finds out who is
        to blame for a wait of so many seconds that has come to its end. The sockets are the session's own from now on.
        """
        self.name, self.route = name, route
        self.known_tokens = 0
        """At its beginning, which all stages have from an earlier session: the first step comes after them."""
        self._out, self._sink, self._start_watch, self._diagnose = out, sink, watch, diagnose
        for stream in (out, sink):
            stream.setblocking(False)
        self._poll = select.poll()
        self._poll.register(out, select.POLLIN)
        self._poll.register(sink, select.POLLIN)
        self._forwards = _Way(Kind.DATA, out)
        self._backwards = _Way(Kind.GRADIENT, sink)
        self._sides = {
            out.fileno(): (out, FrameReader(), route.hops[0].peer, self._backwards),
            sink.fileno(): (sink, FrameReader(), route.hops[-1].peer, self._forwards),
        }
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._using = threading.Lock()
        self._silent_since = 0.0
        self._watch: Watch | None = None
        self._suspect: tuple[float, PeerId] | None = None
        self._error: P2PModelError | None = None
        self._watched = set(self._sides)
        self._closing = False

    @property
    def bytes_sent(self) -> int:
        return self._forwards.outbox.sent + self._backwards.outbox.sent

    @property
    def bytes_received(self) -> int:
        return sum(reader.received for _, reader, _, _ in self._sides.values())

    def step(
        self, body: Buffer, position: int, tokens: int, meta: bytes = b"", timeout: float = 30.0
    ) -> tuple[bytes, Buffer]:
        """Sends one frame and waits for its answer: (meta, body), the body writable and the caller's own.

        Raises PeerFailed, with the peer to blame as best known (empty where all of them answer pings), or the error
        that a stage named, where the request was at fault; Unreachable when this node's own daemon is gone, and Busy
        when the process is out of descriptors, so that nobody can be watched. A peer that stands still, or has lost the
        step, is noticed within seconds; `timeout`, in seconds, plus at most two to find who is stuck, is for those that
        compute.
        """
        began = time.monotonic()
        self.send(body, position, tokens, meta, timeout)
        return self.receive(timeout - (time.monotonic() - began))

    def send(self, body: Buffer, position: int, tokens: int, meta: bytes = b"", timeout: float = 30.0) -> None:
        """Returns when all of it is on its way; answers that arrive meanwhile are kept for `receive`. So several
        frames can be under way at once, each on another stage. Raises as `step` does."""
        self._send(self._forwards, Kind.DATA, body, position, tokens, meta, timeout)

    def receive(self, timeout: float = 30.0) -> tuple[bytes, Buffer]:
        """The next answer, in the order of the frames sent. Raises as `step` does."""
        return self._receive(self._forwards, timeout)

    def send_state(self, body: Buffer, timeout: float = 30.0) -> None:
        """A blob of slot tensors, the session's own for what is sent after it. No answer comes. Raises as `step`."""
        self._send(self._forwards, Kind.STATE, body, 0, 0, b"", timeout)

    def send_gradient(self, body: Buffer, position: int, timeout: float = 30.0) -> None:
        """Of the answer to the frame at `position`, of a session that trains; as `send`."""
        self._send(self._backwards, Kind.GRADIENT, body, position, 0, b"", timeout)

    def receive_gradient(self, timeout: float = 30.0) -> Buffer:
        """The next answer to a gradient, in the order in which they were sent. Raises as `step` does."""
        return self._receive(self._backwards, timeout)[1]

    def _send(
        self, way: "_Way", kind: Kind, body: Buffer, position: int, tokens: int, meta: bytes, timeout: float
    ) -> None:
        with self._using:
            self._check()
            way.outbox.put_data(body, position, tokens, meta, kind)
            if kind is not Kind.STATE:
                way.asked.append((position, tokens))
            way.sent += 1
            way.outbox.flush(way.out)
            if way.outbox.size:
                self._watch_for(way.out, select.POLLIN | select.POLLOUT)
                with self._waiting(timeout) as deadline:
                    while way.outbox.size:
                        self._wait(deadline, timeout)
                self._watch_for(way.out, select.POLLIN)

    def _watch_for(self, stream: socket.socket, events: int) -> None:
        if stream.fileno() in self._watched:  # it may have ended in the meantime
            self._poll.modify(stream, events)

    def _receive(self, way: "_Way", timeout: float) -> tuple[bytes, Buffer]:
        with self._using:
            if not way.inbox:
                self._check()
                with self._waiting(timeout) as deadline:
                    while not way.inbox:
                        self._wait(deadline, timeout)
            frame = way.inbox.popleft()
            return frame.meta, frame.body

    def close(self) -> None:
        """Tells the stages, which free what they hold. A step that another thread waits in ends with PeerFailed."""
        self._closing = True
        if not self._using.acquire(blocking=False):
            for stream in (self._out, self._sink):
                with contextlib.suppress(OSError):  # it may fail at this moment
                    stream.shutdown(socket.SHUT_RDWR)
            self._using.acquire()
        try:
            if self._error is None:
                self._say_goodbye()
                self._fail(PeerFailed("The session is closed."))
        finally:
            self._using.release()

    def _say_goodbye(self) -> None:
        self._forwards.outbox.put(frames.pack(Kind.CLOSE))
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            self._forwards.outbox.flush(self._out)
            while self._sink.fileno() in self._watched and time.monotonic() < deadline:
                self._poll_once(deadline)
        except P2PModelError:
            pass  # it ends either way

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _waiting(self, timeout: float) -> Iterator[float]:
        """Until when; with nobody pinging any more afterwards."""
        self._silent_since = time.monotonic()
        try:
            yield self._silent_since + timeout
        finally:
            if self._watch is not None:
                self._end_watch(self._watch)

    def _end_watch(self, watch: Watch) -> None:
        self._watch = None
        self._poll.unregister(watch.bell)
        watch.close()

    def _wait(self, deadline: float, timeout: float) -> None:
        """Lets something happen on the sockets. Raises when the session has failed, or the deadline has passed."""
        if self._closing:
            raise self._fail(PeerFailed("The session is closed."))
        if self._suspect is not None:
            lost_at, peer = self._suspect
            if not self._watched or time.monotonic() >= lost_at + GRACE_SECONDS:
                raise self._fail(lost(peer))
            deadline = min(deadline, lost_at + GRACE_SECONDS)
        elif (now := time.monotonic()) >= deadline:
            raise self._fail(self._diagnose(timeout))
        elif self._watch is None:
            if now >= self._silent_since + SILENCE_SECONDS:
                try:
                    self._watch = self._start_watch(lambda: (self._forwards.sent, self._backwards.sent))
                except P2PModelError as error:
                    raise self._fail(error) from None
                self._poll.register(self._watch.bell, select.POLLIN)
            else:
                deadline = min(deadline, self._silent_since + SILENCE_SECONDS)
        self._poll_once(deadline)

    def _poll_once(self, deadline: float) -> None:
        came = False
        for descriptor, events in self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if descriptor in self._sides:
                if events & select.POLLOUT:
                    way = self._forwards if descriptor == self._out.fileno() else self._backwards
                    way.outbox.flush(way.out)
                if events & _CAME:
                    came = True
                    self._read(descriptor)
        if self._watch is not None:
            if came:
                self._end_watch(self._watch)
                self._silent_since = time.monotonic()
            elif self._watch.error is not None:
                raise self._fail(self._watch.error)

    def _read(self, descriptor: int) -> None:
        stream, reader, neighbour, way = self._sides[descriptor]
        try:
            arrived = reader.read(stream, self._scratch)
        except BlockingIOError:
            return
        except (OSError, EOFError):
            self._silent(descriptor)
            return
        except Rejected:
            raise self._fail(PeerFailed(f"Peer …{neighbour[-8:]} sent a malformed frame.", neighbour)) from None
        for frame in arrived:
            if frame.kind is way.kind:
                if not way.asked or way.asked.popleft() != (frame.position, frame.tokens):
                    error = PeerFailed(f"Peer …{neighbour[-8:]} answered what it was not asked.", neighbour)
                    raise self._fail(error)
                way.inbox.append(frame)
            elif frame.kind is Kind.ERROR:
                raise self._fail(self._reported(frame, neighbour))
            elif frame.kind is Kind.CLOSE and self._closing:
                self._silent(descriptor)
            else:
                raise self._fail(PeerFailed(f"Peer …{neighbour[-8:]} sent a frame that has no place there.", neighbour))

    def _silent(self, descriptor: int) -> None:
        """One side has closed. The first to do so is the suspect, until the other side says more."""
        stream, _, neighbour, _ = self._sides[descriptor]
        self._suspect = self._suspect or (time.monotonic(), neighbour)
        self._poll.unregister(stream)
        self._watched.discard(descriptor)

    def _reported(self, frame: Frame, neighbour: PeerId) -> P2PModelError:
        try:
            return Failure.read(frame.meta).error_for(self.route, neighbour)
        except Rejected:
            return PeerFailed(f"Peer …{neighbour[-8:]} failed, and did not say why.", neighbour)

    def _fail(self, error: P2PModelError) -> P2PModelError:
        self._error = error
        self._out.close()
        self._sink.close()
        return error


class _Way:
    """One direction through the chain. kind: of the frames that are answered; out: where they go in; asked: (position,
    tokens) of those that wait for an answer."""

    def __init__(self, kind: Kind, out: socket.socket) -> None:
        self.kind, self.out = kind, out
        self.outbox = Outbox()
        self.asked: deque[tuple[int, int]] = deque()
        self.inbox: deque[Frame] = deque()
        self.sent = 0
