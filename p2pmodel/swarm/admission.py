"""Lets sessions in: everything about them that waits for somebody, kept away from the compute thread."""

import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from p2pmodel.domain.errors import Busy, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import StageRunner
from p2pmodel.swarm.framing import receive_frame
from p2pmodel.swarm.opening import CHAIN, Opening, lost
from p2pmodel.swarm.streams import Host, Listener, open_stream

HANDSHAKE_SECONDS = 5.0
DIAL_SECONDS = 8.0
"""For the next hop: less than a client waits, so that it still hears why its session did not open."""
WORKERS = 16
MAX_WAITING = 128

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admitted:
    """An open session between its two neighbours; the next one may be the client's sink."""

    opening: Opening
    handle: Any
    before: socket.socket
    before_peer: PeerId
    after: socket.socket
    after_peer: PeerId


@dataclass(frozen=True)
class Outcomes:
    """Where the results go. Called from the admitting threads; each hands its arguments over for good."""

    admitted: Callable[[Admitted], None]
    refused: Callable[[socket.socket, P2PModelError], None]
    abandoned: Callable[[Any], None]
    """A handle whose session came to nothing."""


class Admission:
    """Reads the first frame of each stream, asks the runner, opens the next hop. The runner is asked by one thread at a
    time; several wait for slow peers."""

    def __init__(self, host: Host, runner: StageRunner, seats: threading.Semaphore, outcomes: Outcomes) -> None:
        """`seats`: one is taken for every handle that the runner opens, and given back by whoever closes the handle."""
        self._host, self._runner, self._seats, self._outcomes = host, runner, seats, outcomes
        self._runner_lock = threading.Lock()
        self._waiting = threading.Semaphore(MAX_WAITING)
        self._listener: Listener | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._listener = Listener(self._host, CHAIN)
        self._pool = ThreadPoolExecutor(WORKERS, "chain-admit")
        self._thread = threading.Thread(
            target=self._accept, args=(self._listener, self._pool), name="chain-accept", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Returns when no admission is under way any more, which takes at most the time of a handshake and a dial."""
        if self._listener is None or self._pool is None or self._thread is None:
            return
        try:
            self._listener.close()
            self._thread.join()
        finally:
            self._pool.shutdown()

    def _accept(self, listener: Listener, pool: ThreadPoolExecutor) -> None:
        while True:
            try:
                before, peer = listener.accept()
            except EOFError:
                return
            if self._waiting.acquire(blocking=False):
                try:
                    pool.submit(self._admit, before, peer)
                except RuntimeError as error:  # it is queued already: the next thread that there is takes it up
                    log.warning("a session waits for a thread: %s", error)
            else:
                before.close()

    def _admit(self, before: socket.socket, peer: PeerId) -> None:
        try:
            self._handshake(before, peer)
        except P2PModelError as error:
            self._outcomes.refused(before, error)
        except Exception:
            log.exception("a session could not be opened")
            self._outcomes.refused(before, PeerFailed("This peer failed to open the session.", self._host.peer))
        finally:
            self._waiting.release()

    def _handshake(self, before: socket.socket, peer: PeerId) -> None:
        try:
            first = receive_frame(before, HANDSHAKE_SECONDS)
        except (OSError, EOFError):
            before.close()
            return
        try:
            opening = Opening.read(first.kind, first.meta)
        except Rejected as error:
            log.info("peer %s opened a stream with nonsense: %r", peer, error.message)
            raise
        if not self._seats.acquire(blocking=False):
            raise Busy("This peer serves as many sessions as it can.", "Try again later, or another peer.")
        try:
            with self._runner_lock:
                handle = self._runner.open(opening.request)
                known = self._runner.known(handle)
        except BaseException:
            self._seats.release()
            raise
        try:
            after_peer, after = self._onward(opening, known)
        except BaseException:
            self._outcomes.abandoned(handle)
            raise
        before.setblocking(False)
        self._outcomes.admitted(Admitted(opening, handle, before, peer, after, after_peer))

    def _onward(self, opening: Opening, known: tuple[bytes, ...]) -> tuple[PeerId, socket.socket]:
        peer, protocol, told = opening.onward(known)
        after = open_stream(self._host, peer, protocol, DIAL_SECONDS)
        try:
            after.settimeout(HANDSHAKE_SECONDS)
            after.sendall(told.frame())
            after.setblocking(False)
        except OSError:
            after.close()
            raise lost(peer) from None
        return peer, after
