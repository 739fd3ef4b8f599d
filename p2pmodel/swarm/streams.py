"""p2pd's streams as plain Unix sockets, so that whoever moves bytes owns them, in any thread, without an event loop.

p2pd is asked over its control socket (varint-framed protobuf, hivemind's p2pd.proto); the connection on which a stream
was asked for becomes the stream. An incoming stream is a connection that p2pd makes to our listening socket. There is
no half-close, and closing an end may discard what the other has not read yet: protocols say their end with a frame,
and who sent the last frame waits for the other to close.
"""

import contextlib
import errno
import logging
import math
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage
from hivemind.p2p import PeerID
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from p2pmodel.domain.errors import Busy, PeerFailed, Unreachable
from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm.membership import Membership, WaitingRoom

MAX_CONTROL_BYTES = 1 << 20
CONTROL_SECONDS = 5.0
"""The daemon is on this machine: what takes longer is not slow but gone."""
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)

_local: dict[tuple[str, str], str] = {}
"""(peer, protocol) -> path of the listening socket in this process: libp2p refuses to dial itself."""


class Host(Protocol):
    """What the streams need of a peer's host."""

    @property
    def p2p(self) -> Any:
        """hivemind's P2P, started."""

    @property
    def peer(self) -> str: ...

    @property
    def membership(self) -> Membership: ...


def open_stream(host: Host, peer: PeerId, protocol: str, timeout: float = 10.0) -> socket.socket:
    """A blocking socket; bytes written to it come out at `peer`'s Listener of `protocol`. A stream to a peer that is
    stopped opens too, and only its silence tells.

    Raises PeerFailed when the peer cannot be reached or does not speak the protocol, Unreachable when this node's own
    daemon is gone, Busy when the process is out of descriptors.
    """
    if peer == host.peer:
        local = _open_local(peer, protocol)
        host.membership.greet(local, protocol, peer, timeout)
        return local
    until = time.monotonic() + timeout
    dial = p2pd_pb2.StreamOpenRequest(
        peer=PeerID.from_base58(peer).to_bytes(), proto=[protocol], timeout=max(1, math.ceil(timeout))
    )
    request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=dial)
    try:
        stream, response = _ask(host, request, timeout)
    except TimeoutError:
        raise PeerFailed(f"Peer …{peer[-8:]} could not be reached within {timeout:.0f} s.", peer) from None
    if response.type == p2pd_pb2.Response.ERROR:
        stream.close()
        raise PeerFailed(f"Peer …{peer[-8:]} could not be reached: {response.error.msg[:200]}.", peer)
    host.membership.greet(stream, protocol, peer, max(0.001, until - time.monotonic()))
    return stream


def check_daemon(host: Host, timeout: float = CONTROL_SECONDS) -> None:
    """Raises Unreachable when this node's own daemon does not answer in time."""
    try:
        connection, _ = _ask(host, p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY), timeout)
    except TimeoutError:
        raise Unreachable("This node's own P2P daemon does not answer.", "Restart the node.") from None
    connection.close()


class Listener:
    """Takes the incoming streams of one protocol. The socket lies in a folder of this user's alone, since whoever
    can connect to it can claim to be any peer."""

    def __init__(self, host: Host, protocol: str, backlog: int = 512) -> None:
        """Raises Unreachable when the daemon is gone or refuses, for example because the protocol is taken; Busy when
        the process is out of descriptors."""
        self._host, self._protocol = host, protocol
        self._socket = _new_socket()
        self._folder = tempfile.TemporaryDirectory(prefix="p2pmodel-")
        self._path = str(Path(self._folder.name) / "streams.sock")
        self._closed = threading.Event()
        self._waiting: WaitingRoom | None = None
        try:
            self._socket.bind(self._path)
            self._socket.listen(backlog)
            if host.membership.private:
                self._waiting = WaitingRoom(host.membership, protocol, self._socket)
            self._tell(
                p2pd_pb2.Request(
                    type=p2pd_pb2.Request.STREAM_HANDLER,
                    streamHandler=p2pd_pb2.StreamHandlerRequest(addr=self._address(), proto=[protocol], balanced=False),
                )
            )
        except BaseException:
            if self._waiting is not None:
                self._waiting.close()
            self._socket.close()
            self._folder.cleanup()
            raise
        _local[host.peer, protocol] = self._path

    def accept(self) -> tuple[socket.socket, PeerId]:
        """The next stream, blocking, and who opened it, as p2pd has authenticated it; in a private swarm, a member's.
        For one thread at a time.

        Raises EOFError once the listener is closed. Waits a little where the process is out of descriptors, so that
        nobody spins.
        """
        while not self._closed.is_set():
            if self._waiting is not None and (member := self._waiting.next()):
                return member
            try:
                stream, _ = self._socket.accept()
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    self._closed.wait(0.1)
                continue
            try:
                stream.settimeout(CONTROL_SECONDS)
                info = _get(stream, p2pd_pb2.StreamInfo())
                stream.settimeout(None)
                caller = PeerId(PeerID(info.peer).to_base58())
                if self._waiting is None:
                    return stream, caller
                self._waiting.enter(stream, caller)
            except (OSError, EOFError, DecodeError):
                stream.close()
        if self._waiting is not None:
            self._waiting.close()
        raise EOFError("the listener is closed")

    def close(self) -> None:
        """Takes the protocol back, where the daemon can be told, and wakes whoever waits in `accept`. Raises nothing; a
        second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        _local.pop((self._host.peer, self._protocol), None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._tell(
                p2pd_pb2.Request(
                    type=p2pd_pb2.Request.REMOVE_STREAM_HANDLER,
                    removeStreamHandler=p2pd_pb2.RemoveStreamHandlerRequest(
                        addr=self._address(), proto=[self._protocol]
                    ),
                )
            )
        except (Unreachable, Busy) as error:  # a daemon that is gone has no handlers left
            log.debug("%s is not taken back: %s", self._protocol, error)
        finally:
            with contextlib.suppress(OSError):
                self._folder.cleanup()

    def _address(self) -> bytes:
        return bytes(Multiaddr("/unix" + self._path).to_bytes())

    def _tell(self, request: ProtobufMessage) -> None:
        try:
            connection, response = _ask(self._host, request, CONTROL_SECONDS)
        except TimeoutError:
            raise Unreachable("This node's P2P daemon does not answer.") from None
        connection.close()
        if response.type == p2pd_pb2.Response.ERROR:
            raise Unreachable(f"This node's P2P daemon refuses {self._protocol}: {response.error.msg[:200]}.")


def _open_local(peer: PeerId, protocol: str) -> socket.socket:
    path = _local.get((peer, protocol))
    if path is None:
        raise PeerFailed(f"This peer itself does not serve {protocol}.", peer)
    stream = _new_socket()
    try:
        stream.settimeout(CONTROL_SECONDS)
        stream.connect(path)
        _put(stream, p2pd_pb2.StreamInfo(peer=PeerID.from_base58(peer).to_bytes(), addr=b"", proto=protocol))
        stream.settimeout(None)
    except OSError as error:
        stream.close()
        raise PeerFailed(f"This peer itself does not serve {protocol}: {error}.", peer) from None
    return stream


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Raises Busy when the process is out of descriptors."""
    try:
        return socket.socketpair()
    except OSError as error:
        raise _out_of_descriptors(error) from None


def _new_socket() -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX)
    except OSError as error:
        raise _out_of_descriptors(error) from None


def _out_of_descriptors(error: OSError) -> Busy:
    return Busy(f"No further stream can be opened: {error.strerror}.", "Raise the limit of open files.")


def _ask(host: Host, request: ProtobufMessage, timeout: float) -> tuple[socket.socket, Any]:
    """The connection, blocking, and the daemon's answer. Raises Unreachable, TimeoutError, Busy."""
    connection = _new_socket()
    try:
        connection.settimeout(timeout)
        connection.connect(host.p2p.daemon_listen_maddr["unix"])
        _put(connection, request)
        response = _get(connection, p2pd_pb2.Response())
        connection.settimeout(None)
        return connection, response
    except TimeoutError:
        connection.close()
        raise
    except (OSError, EOFError, DecodeError) as error:
        connection.close()
        raise Unreachable(f"This node's P2P daemon does not answer: {error}.", "Restart the node.") from None


def _put(connection: socket.socket, message: ProtobufMessage) -> None:
    body = message.SerializeToString()
    length, head = len(body), bytearray()
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    connection.sendall(bytes(head) + body)


def _get(connection: socket.socket, message: Any) -> Any:
    """Reads not one byte more than the message: the stream's own bytes follow it."""
    length = shift = 0
    while True:
        byte = _exactly(connection, 1)[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 28:
            raise DecodeError("the length is no varint")
    if length > MAX_CONTROL_BYTES:
        raise DecodeError("the message is too large")
    message.ParseFromString(bytes(_exactly(connection, length)))
    return message


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError("the daemon hung up")
        view = view[got:]
    return data
