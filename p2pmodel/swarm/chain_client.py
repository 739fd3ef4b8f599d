"""Opens sessions through a route of stages, and takes in the streams that their last stages open to this peer."""

import contextlib
import logging
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from p2pmodel.domain.errors import NotRunning, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import PREFIX_BLOCK, Route, SessionRequest
from p2pmodel.swarm.chain_session import GRACE_SECONDS
from p2pmodel.swarm.chain_session import ChainSession as ChainSession
from p2pmodel.swarm.framing import receive_frame
from p2pmodel.swarm.opening import CHAIN, SINK, Failure, Opening, lost
from p2pmodel.swarm.ping import probe, probe_all
from p2pmodel.swarm.streams import Host, Listener, check_daemon, open_stream, socket_pair
from p2pmodel.swarm.watch import PROBE_SECONDS, SILENCE_SECONDS, Watch
from p2pmodel.wire.frames import Kind

SINK_SECONDS = 2.0
"""For the first frame of a last stage's stream; those of one peer are read one after another."""
MAX_ARRIVED = 256
"""Streams of one peer that wait to be read."""
DIAL_SECONDS = 3.0
"""For a stream to the first stage, which the caller has connected to already."""
STOP_SECONDS = 0.25
"""Between two looks whether a session that is being opened is still wanted."""
MAX_OPEN_SHARE = 0.75
"""Of the time to open a session, what may pass before pings look for the peer that is stuck."""

log = logging.getLogger(__name__)


@dataclass
class _Awaited:
    """A session that waits for its last stage's stream; a byte from `ringer` to `bell` says that `sink` has come."""

    session: str
    route: Route
    bell: socket.socket
    ringer: socket.socket
    sink: socket.socket | None = None
    known: tuple[bytes, ...] = ()

    @property
    def last(self) -> PeerId:
        return self.route.hops[-1].peer


class ChainClient:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._awaited: dict[str, _Awaited] = {}
        self._arrived: dict[PeerId, deque[socket.socket]] = {}
        self._sessions: weakref.WeakSet[ChainSession] = weakref.WeakSet()

    def start(self) -> None:
        """Raises Unreachable when the daemon is gone, or another client of this peer has the protocol."""
        self._listener = Listener(self._host, SINK)
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), name="chain-sink", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Closes all sessions. Blocks; not for the event loop."""
        if self._listener is None or self._thread is None:
            return
        listener, self._listener = self._listener, None
        with contextlib.ExitStack() as stack:  # each of them, whatever the others raise
            for session in list(self._sessions):
                stack.callback(session.close)
            stack.callback(self._thread.join)
            stack.callback(listener.close)

    def open(
        self, route: Route, request: SessionRequest, timeout: float = 15.0, stopped: Callable[[], bool] = lambda: False
    ) -> ChainSession:
        """Returns when every stage of the route has opened the session; blocks, so not for the event loop's thread.

        request: to the first stage, by a name of its own; stopped: is asked now and then whether nobody wants the
        session any more; then PeerFailed is raised.

        Raises within `timeout` seconds, and within 4 where a peer of the route answers no pings: PeerFailed, with the
        peer to blame as best known and a stage's own error as its cause; the error that a stage named, where the
        request was at fault; ValueError when the request does not fit the route; Unreachable when this node's own
        daemon is gone; Busy when the process is out of descriptors.
        """
        if self._listener is None:
            raise NotRunning("The chain client is not started.")
        began = time.monotonic()
        first = route.hops[0].peer
        opening = Opening(request, route.hops[1:], PeerId(self._host.peer))
        awaited = _Awaited(request.session, route, *socket_pair())
        with self._lock:
            self._awaited[request.session] = awaited
        out: socket.socket | None = None
        try:
            out = open_stream(self._host, first, CHAIN, min(DIAL_SECONDS, timeout * MAX_OPEN_SHARE))
            self._send_opening(out, first, opening, timeout)
            sink = self._await(awaited, out, began, timeout, stopped)
        except BaseException:
            with self._lock:
                self._awaited.pop(request.session, None)
            for stream in (out, awaited.sink):
                if stream is not None:
                    stream.close()
            raise
        finally:
            awaited.bell.close()
            awaited.ringer.close()
        session = ChainSession(
            request.session,
            route,
            out,
            sink,
            lambda sent: Watch(self._host, route, request.session, sent),
            lambda waited: self._diagnose(route, waited, PROBE_SECONDS),
        )
        session.known_tokens = min(len(awaited.known), len(request.prefix)) * PREFIX_BLOCK
        self._sessions.add(session)
        return session

    def ping(self, peer: PeerId, timeout: float = 2.0) -> float:
        """Seconds of a round trip to `peer`'s ping thread, which answers while its compute thread computes.

        Raises PeerFailed when it does not answer in time.
        """
        return probe(self._host, peer, timeout).seconds

    def _send_opening(self, out: socket.socket, peer: PeerId, opening: Opening, timeout: float) -> None:
        try:
            out.settimeout(timeout)
            out.sendall(opening.frame())
        except OSError:
            raise lost(peer) from None

    def _await(
        self, awaited: _Awaited, out: socket.socket, began: float, timeout: float, stopped: Callable[[], bool]
    ) -> socket.socket:
        """The sink's stream, or the error that comes back on `out` instead."""
        patience, deadline = began + timeout * MAX_OPEN_SHARE, began + timeout
        poll = select.poll()
        poll.register(awaited.bell, select.POLLIN)
        poll.register(out, select.POLLIN)
        watch: Watch | None = None
        wake = min(patience, began + SILENCE_SECONDS)
        try:
            while (now := time.monotonic()) < patience:
                if watch is None and now >= wake:
                    watch, wake = Watch(self._host, awaited.route, awaited.session, None), patience
                    poll.register(watch.bell, select.POLLIN)
                if stopped():
                    raise PeerFailed("The session is closed.")
                happened = dict(poll.poll(min(wake - now, STOP_SECONDS) * 1000))
                if awaited.bell.fileno() in happened:
                    assert awaited.sink is not None
                    return awaited.sink
                if out.fileno() in happened:
                    raise self._refusal(out, awaited.route)
                if watch is not None and watch.error is not None:
                    raise watch.error
        finally:
            if watch is not None:
                watch.close()
        raise self._diagnose(awaited.route, patience - began, max(GRACE_SECONDS, deadline - time.monotonic()))

    def _refusal(self, out: socket.socket, route: Route) -> P2PModelError:
        first = route.hops[0].peer
        try:
            frame = receive_frame(out, GRACE_SECONDS)
            if frame.kind is Kind.ERROR:
                return Failure.read(frame.meta).error_for(route, first)
        except (OSError, EOFError):
            return lost(first)
        except Rejected:
            pass
        return PeerFailed(f"Peer …{first[-8:]} answered with a frame that has no place there.", first)

    def _diagnose(self, route: Route, waited: float, seconds: float) -> P2PModelError:
        """After a silence: the first peer that answers no ping, else the one that sits in a step for about as long;
        none of them where this machine itself cannot hear."""
        pongs = probe_all(self._host, (hop.peer for hop in route.hops), seconds)
        if not any(pongs.values()):
            try:
                check_daemon(self._host, seconds)
            except P2PModelError as error:
                return error
        for peer, pong in pongs.items():
            if pong is None:
                return PeerFailed(f"Peer …{peer[-8:]} does not answer any more.", peer)
        busy, peer = max((pong.busy_seconds, peer) for peer, pong in pongs.items() if pong is not None)
        if busy > waited / 2:
            return PeerFailed(f"Peer …{peer[-8:]} has been busy with one step for {busy:.1f} s.", peer)
        return PeerFailed("No answer came in time, though every peer of the route answers pings.", hint="Try again.")

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                stream, peer = listener.accept()
            except EOFError:
                return
            with self._lock:
                expected = any(awaited.last == peer for awaited in self._awaited.values())
                waiting = self._arrived.get(peer)
                if expected and waiting is None:
                    self._arrived[peer] = deque([stream])
                elif expected and waiting is not None and len(waiting) < MAX_ARRIVED:
                    waiting.append(stream)
                    continue
            if expected and waiting is None:
                self._begin_matching(peer)
            else:
                log.info("peer %s opened a stream that nobody waits for", peer)
                stream.close()

    def _begin_matching(self, peer: PeerId) -> None:
        """In a thread of its own, so that a peer which says nothing keeps no other one waiting."""
        try:
            threading.Thread(target=self._match_all, args=(peer,), name="chain-match", daemon=True).start()
        except RuntimeError as error:
            log.warning("the streams of peer %s cannot be read: %s", peer, error)
            with self._lock:
                turned_away = self._arrived.pop(peer)
            for stream in turned_away:
                stream.close()

    def _match_all(self, peer: PeerId) -> None:
        while True:
            with self._lock:
                waiting = self._arrived[peer]
                if not waiting:
                    del self._arrived[peer]
                    return
                stream = waiting.popleft()
            self._match(stream, peer)

    def _match(self, stream: socket.socket, peer: PeerId) -> None:
        try:
            frame = receive_frame(stream, SINK_SECONDS)
            request = Opening.read(frame.kind, frame.meta).request
        except (OSError, EOFError, Rejected) as error:
            log.info("peer %s opened a stream with nonsense: %r", peer, error)
            stream.close()
            return
        with self._lock:
            awaited = self._awaited.get(request.session)
            if awaited is not None and awaited.last == peer:
                del self._awaited[request.session]
                awaited.sink, awaited.known = stream, request.prefix
                awaited.ringer.send(b"\0")
                return
        stream.close()
