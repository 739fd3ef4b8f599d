"""A trunk's stream to one expert host, and waiting on several of them at once, in the thread that computes."""

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Sequence

from p2pmodel.domain.errors import PeerFailed, Rejected
from p2pmodel.domain.experts import ExpertOpening
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import Buffer
from p2pmodel.swarm.expert_streams import EXPERTS, HANDSHAKE_SECONDS, opening_frame, told
from p2pmodel.swarm.framing import SCRATCH_BYTES, FrameReader, Outbox, receive_frame
from p2pmodel.swarm.opening import lost
from p2pmodel.swarm.streams import Host, open_stream
from p2pmodel.wire import frames
from p2pmodel.wire.frames import Kind

DIAL_SECONDS = 5.0


class ExpertLink:
    """Frames go out in order, and answers come back in that order. One thread at a time uses it, but for `is_over`,
    `quiet` and `failed`, which any may read. delay: seconds one way, as the handshake took; opened: when it was."""

    def __init__(self, peer: PeerId, stream: socket.socket, delay: float) -> None:
        stream.setblocking(False)
        self.peer, self.delay, self.stream = peer, delay, stream
        self.failed: PeerFailed | None = None
        self.opened = self._used = time.monotonic()
        self._reader, self._outbox = FrameReader(most=0), Outbox()
        self._asked: deque[int] = deque()
        self._sent = 0
        self._answers: deque[Buffer] = deque()

    @classmethod
    def open(cls, host: Host, peer: PeerId, opening: ExpertOpening) -> "ExpertLink":
        """Blocks. Raises PeerFailed when the peer cannot be reached or refuses, Unreachable, Busy."""
        stream = open_stream(host, peer, EXPERTS, DIAL_SECONDS)
        began = time.monotonic()
        try:
            stream.settimeout(HANDSHAKE_SECONDS)
            stream.sendall(opening_frame(opening))
            answer = receive_frame(stream, HANDSHAKE_SECONDS)
            if answer.kind is Kind.ERROR:
                raise told(answer, peer)
            if answer.kind is not Kind.OPEN:
                raise PeerFailed(f"Expert host …{peer[-8:]} answered nonsense.", peer)
        except TimeoutError:
            stream.close()
            raise PeerFailed(f"Expert host …{peer[-8:]} does not answer.", peer) from None
        except (OSError, EOFError, Rejected):
            stream.close()
            raise lost(peer) from None
        except PeerFailed:
            stream.close()
            raise
        return cls(peer, stream, (time.monotonic() - began) / 2)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received."""
        return self._outbox.sent, self._reader.received

    @property
    def quiet(self) -> float:
        """Seconds since anything was sent."""
        return time.monotonic() - self._used

    def send(self, meta: bytes, body: Buffer, rows: int, answer: int) -> None:
        """Without blocking: what does not go at once goes in `happened`. answer: the bytes that come back. Raises
        Rejected("frame") for more than a frame holds; nothing is sent then."""
        number = self._sent + 1
        self._outbox.put_data(body, number & 0xFFFFFFFF, rows, meta)
        self._sent, self._used = number, time.monotonic()
        self._asked.append(number & 0xFFFFFFFF)
        self._reader.most = max(self._reader.most, answer)
        self._outbox.flush(self.stream)

    def take(self) -> list[Buffer]:
        """The answers that have come, in the order of what was sent."""
        found, self._answers = list(self._answers), deque()
        return found

    def fail(self, error: PeerFailed) -> None:
        """It is of no use from now on."""
        if self.failed is None:
            self.failed = error
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.send(frames.pack(Kind.CLOSE))
        self.stream.close()

    def drain(self, scratch: memoryview) -> None:
        """Reads what is there, without waiting. It may have failed afterwards."""
        events = select.poll()
        while self.failed is None:
            events.register(self.stream, self.wants())
            if not (found := events.poll(0)):
                return
            self.happened(found[0][1], scratch)

    def is_over(self) -> bool:
        """Whether the other end has closed, or says why it is about to. Reads nothing; any thread may ask."""
        sent, owed = self._sent, bool(self._asked)
        try:
            found = self.stream.recv(1, socket.MSG_PEEK)
            return not found or (not owed and self._sent == sent)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def wants(self) -> int:
        return select.POLLIN | (select.POLLOUT if self._outbox.size else 0)

    def happened(self, events: int, scratch: memoryview) -> None:
        """What poll said. Afterwards it may have failed."""
        if events & select.POLLOUT:
            self._outbox.flush(self.stream)
        if not events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return
        try:
            arrived = self._reader.read(self.stream, scratch)
        except BlockingIOError:
            return
        except (OSError, EOFError):
            self.fail(lost(self.peer))
            return
        except Rejected:
            self.fail(PeerFailed(f"Expert host …{self.peer[-8:]} sent a malformed frame.", self.peer))
            return
        for frame in arrived:
            if frame.kind is Kind.ERROR:
                self.fail(told(frame, self.peer))
                return
            if frame.kind is not Kind.DATA or not self._asked or self._asked.popleft() != frame.position:
                self.fail(PeerFailed(f"Expert host …{self.peer[-8:]} answered what it was not asked.", self.peer))
                return
            self._answers.append(frame.body)


class Switch:
    """Waits on links, for the thread that computes."""

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))

    def wait(self, links: Sequence[ExpertLink], timeout: float) -> None:
        """Returns when something has happened on one of `links`, or after `timeout` seconds."""
        poll = select.poll()
        by_descriptor = {}
        for link in links:
            if link.failed is None:
                by_descriptor[link.stream.fileno()] = link
                poll.register(link.stream, link.wants())
        for descriptor, events in poll.poll(max(0.0, timeout) * 1000):
            by_descriptor[descriptor].happened(events, self._scratch)
