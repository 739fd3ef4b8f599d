"""Who belongs to a private swarm: every stream and every call begins with a pass that only members can make.

    stream   caller: u8 whether an answer is wanted · pass        called, where it is wanted: pass
    call     caller: pass · request                               called: pass · response

p2pd has authenticated both PeerIds before (Noise or TLS), and a pass names both: see `wire.swarm_key`. So it needs no
nonce, and costs no round trip but the first one to a peer, after which that peer is known to be a member. Without a key
nothing is sent and nobody is refused. In a private swarm, what has no valid pass is closed before it is looked at.
"""

import asyncio
import hmac
import select
import socket
import time
from collections import OrderedDict

from p2pmodel.domain.errors import PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.wire.swarm_key import PASS_BYTES, SwarmKey

HELLO_BYTES = 1 + PASS_BYTES
HELLO_SECONDS = 5.0
MAX_WAITING = 256
"""Streams whose pass has not come yet."""
MAX_KNOWN = 4096

_SILENT, _ANSWER = b"\0", b"\1"


class Membership:
    """Of `peer`, which this process is; in a swarm that anybody may join when `key` is None. Safe in any thread."""

    def __init__(self, key: SwarmKey | None, peer: PeerId) -> None:
        self._key, self._peer = key, peer
        self._members: OrderedDict[PeerId, None] = OrderedDict({peer: None})
        self._unheard = 0

    @property
    def private(self) -> bool:
        return self._key is not None

    # ---- streams

    def hello(self, protocol: str, called: PeerId) -> bytes:
        """What a stream to `called` begins with."""
        if self._key is None:
            return b""
        wanted = _SILENT if called in self._members else _ANSWER
        return wanted + self._key.call_pass(protocol, self._peer, called)

    def greet(self, stream: socket.socket, protocol: str, called: PeerId, seconds: float) -> None:
        """Begins a stream that is open; it is blocking again afterwards. Raises PeerFailed, and closes it, when the
        called one does not show that it is a member in time."""
        hello = self.hello(protocol, called)
        if not hello:
            return
        try:
            stream.settimeout(seconds)
            stream.sendall(hello)
            if hello[:1] == _ANSWER:
                answer, until = b"", time.monotonic() + seconds
                while len(answer) < PASS_BYTES:
                    stream.settimeout(max(0.001, until - time.monotonic()))
                    got = stream.recv(PASS_BYTES - len(answer))
                    if not got:
                        break
                    answer += got
                self._check_answer(answer, protocol, called)
            stream.settimeout(None)
        except OSError:
            stream.close()
            raise self._no_member(called) from None
        except PeerFailed:
            stream.close()
            raise

    async def greet_async(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: str, called: PeerId
    ) -> None:
        """As `greet`, without a deadline; leaves it to the caller to close the stream."""
        hello = self.hello(protocol, called)
        if not hello:
            return
        try:
            writer.write(hello)
            await writer.drain()
            if hello[:1] == _ANSWER:
                self._check_answer(await reader.readexactly(PASS_BYTES), protocol, called)
        except (OSError, asyncio.IncompleteReadError):
            raise self._no_member(called) from None

    async def admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: str, caller: PeerId
    ) -> bool:
        """Whether the caller of a stream is a member; answers it when it wants that."""
        if self._key is None:
            return True
        # Strangers that open streams and say nothing shut out strangers alone.
        if self._unheard >= MAX_WAITING and caller not in self._members:
            return False
        self._unheard += 1
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await reader.readexactly(HELLO_BYTES)
                answer = self.answer(hello, protocol, caller)
                if answer:
                    writer.write(answer)
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, Rejected):
            return False
        finally:
            self._unheard -= 1
        return True

    def answer(self, hello: bytes, protocol: str, caller: PeerId) -> bytes:
        """What to say to a hello, which may be nothing. Raises Rejected("member")."""
        assert self._key is not None
        self._check_call(hello[1:], protocol, caller)
        return self._key.answer_pass(protocol, caller, self._peer) if hello[:1] == _ANSWER else b""

    # ---- unary calls

    def seal_request(self, request: bytes, protocol: str, called: PeerId) -> bytes:
        return request if self._key is None else self._key.call_pass(protocol, self._peer, called) + request

    def open_request(self, sealed: bytes, protocol: str, caller: PeerId) -> bytes:
        """Raises Rejected("member")."""
        if self._key is None:
            return sealed
        self._check_call(sealed[:PASS_BYTES], protocol, caller)
        return sealed[PASS_BYTES:]

    def seal_response(self, response: bytes, protocol: str, caller: PeerId) -> bytes:
        return response if self._key is None else self._key.answer_pass(protocol, caller, self._peer) + response

    def open_response(self, sealed: bytes, protocol: str, called: PeerId) -> bytes:
        """Raises PeerFailed."""
        if self._key is None:
            return sealed
        self._check_answer(sealed[:PASS_BYTES], protocol, called)
        return sealed[PASS_BYTES:]

    def _check_call(self, shown: bytes, protocol: str, caller: PeerId) -> None:
        assert self._key is not None
        if not hmac.compare_digest(shown, self._key.call_pass(protocol, caller, self._peer)):
            raise Rejected("member", f"{caller} does not have this swarm's key.")
        self._remember(caller)

    def _check_answer(self, shown: bytes, protocol: str, called: PeerId) -> None:
        assert self._key is not None
        if not hmac.compare_digest(shown, self._key.answer_pass(protocol, self._peer, called)):
            raise self._no_member(called)
        self._remember(called)

    def _remember(self, peer: PeerId) -> None:
        self._members[peer] = None
        if len(self._members) > MAX_KNOWN:
            self._members.popitem(last=False)

    def _no_member(self, peer: PeerId) -> PeerFailed:
        return PeerFailed(
            f"Peer …{peer[-8:]} does not show that it has this swarm's key.", peer, "Compare: p2pmodel swarm-key show"
        )


class WaitingRoom:
    """Accepts the streams of a listening socket whose callers show that they are members, without waiting for any of
    them: who says nothing keeps nobody out."""

    def __init__(self, membership: Membership, protocol: str, listening: socket.socket) -> None:
        self._membership, self._protocol = membership, protocol
        # Of its own, since the number of one that another thread closes may at once be that of another socket.
        self._listening = listening.dup()
        self._waiting: OrderedDict[int, tuple[socket.socket, PeerId, bytearray, float]] = OrderedDict()
        self._poll = select.poll()
        self._poll.register(self._listening, select.POLLIN)

    def enter(self, stream: socket.socket, caller: PeerId) -> None:
        """Takes over a stream of which nothing has been read. The one that has waited longest makes room."""
        stream.setblocking(False)
        descriptor = stream.fileno()
        self._waiting[descriptor] = stream, caller, bytearray(), time.monotonic() + HELLO_SECONDS
        self._poll.register(descriptor, select.POLLIN)
        if len(self._waiting) > MAX_WAITING:
            self._turn_away(next(iter(self._waiting)))

    def next(self) -> tuple[socket.socket, PeerId] | None:
        """A member's stream, blocking; None when a new stream can be accepted, or the listening socket is shut down."""
        while True:
            for descriptor in [d for d, (*_, until) in self._waiting.items() if until < time.monotonic()]:
                self._turn_away(descriptor)
            ready = [descriptor for descriptor, _ in self._poll.poll(500 if self._waiting else None)]
            for descriptor in ready:
                if descriptor in self._waiting and (member := self._listen_to(descriptor)):
                    return member
            if self._listening.fileno() in ready:
                return None

    def close(self) -> None:
        """For the thread that calls `next`."""
        self._listening.close()
        for descriptor in list(self._waiting):
            self._turn_away(descriptor)

    def _listen_to(self, descriptor: int) -> tuple[socket.socket, PeerId] | None:
        stream, caller, said, _ = self._waiting[descriptor]
        try:
            got = stream.recv(HELLO_BYTES - len(said))
            said += got
            if not got:
                raise EOFError
            if len(said) < HELLO_BYTES:
                return None
            answer = self._membership.answer(bytes(said), self._protocol, caller)
            if answer:
                stream.send(answer)
        except (BlockingIOError, InterruptedError):
            return None
        except (OSError, EOFError, Rejected):
            self._turn_away(descriptor)
            return None
        del self._waiting[descriptor]
        self._poll.unregister(descriptor)
        stream.setblocking(True)
        return stream, caller

    def _turn_away(self, descriptor: int) -> None:
        stream, *_ = self._waiting.pop(descriptor)
        self._poll.unregister(descriptor)
        stream.close()
