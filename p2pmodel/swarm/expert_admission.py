"""Lets trunks in: everything about their streams that waits for somebody, kept away from the compute thread."""

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from p2pmodel.domain.errors import Busy, P2PModelError, PeerFailed
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import ExpertRunner
from p2pmodel.swarm.expert_streams import EXPERTS, HANDSHAKE_SECONDS, read_opening
from p2pmodel.swarm.framing import receive_frame
from p2pmodel.swarm.streams import Host, Listener
from p2pmodel.wire import frames
from p2pmodel.wire.frames import Kind

MAX_WAITING = 64
"""Streams whose first frame is being read."""
MAX_WAITING_OF_PEER = 2
"""Of these, so that one that says nothing keeps few threads from the others."""
WORKERS = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcomes:
    """Where the results go. Called from the admitting threads; each hands its arguments over for good."""

    admitted: Callable[[socket.socket, PeerId, Any], None]
    """Stream, trunk, and the runner's handle. The stream does not block."""
    refused: Callable[[socket.socket, P2PModelError], None]


class ExpertAdmission:
    """Reads the first frame of each stream and asks the runner."""

    def __init__(self, host: Host, runner: ExpertRunner, seats: threading.Semaphore, outcomes: Outcomes) -> None:
        """seats: one is taken for every stream that is admitted, and given back by whoever ends it."""
        self._host, self._runner, self._seats, self._outcomes = host, runner, seats, outcomes
        self._waiting: Counter[PeerId] = Counter()
        self._lock = threading.Lock()
        self._listener: Listener | None = None

    def start(self) -> None:
        """Raises Unreachable when the daemon is gone, or another server of this peer has the protocol."""
        self._listener = Listener(self._host, EXPERTS)
        self._pool = ThreadPoolExecutor(WORKERS, "expert-admit")
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), name="expert-accept", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when no admission is under way any more, after seconds at most."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.close()
        self._thread.join()
        self._pool.shutdown()

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                stream, peer = listener.accept()
            except EOFError:
                return
            if self._enter(peer):
                self._pool.submit(self._admit, stream, peer)
            else:
                stream.close()

    def _enter(self, peer: PeerId) -> bool:
        with self._lock:
            has_room = self._waiting.total() < MAX_WAITING and self._waiting[peer] < MAX_WAITING_OF_PEER
            self._waiting[peer] += has_room
            return has_room

    def _admit(self, stream: socket.socket, peer: PeerId) -> None:
        try:
            handle = self._handshake(stream)
        except P2PModelError as error:
            self._outcomes.refused(stream, error)
        except (OSError, EOFError):
            stream.close()
        except Exception:
            log.exception("a trunk could not be admitted")
            self._outcomes.refused(stream, PeerFailed("This peer failed.", PeerId(self._host.peer)))
        else:
            self._outcomes.admitted(stream, peer, handle)
        finally:
            with self._lock:
                self._waiting[peer] -= 1
                if not self._waiting[peer]:
                    del self._waiting[peer]

    def _handshake(self, stream: socket.socket) -> Any:
        opening = read_opening(receive_frame(stream, HANDSHAKE_SECONDS))
        if not self._seats.acquire(blocking=False):
            raise Busy("This peer serves as many trunks as it can.", "Try another peer.")
        try:
            handle = self._runner.open(opening)
            stream.settimeout(HANDSHAKE_SECONDS)
            stream.sendall(frames.pack(Kind.OPEN))
            stream.setblocking(False)
        except BaseException:
            self._seats.release()
            raise
        return handle
