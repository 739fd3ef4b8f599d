"""Pings the hops of a route while somebody waits for it, and says when the wait is in vain.

Nobody pings while steps are fast: a watch begins only after a silence. Its pings run in threads of their own, so that
an answer which comes meanwhile is not held up.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from p2pmodel.domain.errors import Busy, P2PModelError, PeerFailed
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Route
from p2pmodel.logic.vigil import MISSES, Sign, Vigil
from p2pmodel.swarm.ping import probe_all
from p2pmodel.swarm.streams import Host, check_daemon, socket_pair

SILENCE_SECONDS = 1.0
"""Without an answer for so long, a watch begins."""
ROUND_SECONDS = 1.0
PROBE_SECONDS = 1.25
"""For an answer to a ping; with SILENCE_SECONDS and two misses, a stopped peer is noticed after 3.5 s."""
SLACK_SECONDS = 1.0
"""A round that takes so much longer was held up on this machine, which says nothing about others."""

log = logging.getLogger(__name__)


class Watch:
    """A socket to wait on: `bell` becomes readable when `error` is set. Closed by the waiter, at once."""

    def __init__(self, host: Host, route: Route, session: str, sent: Callable[[], tuple[int, int]] | None) -> None:
        """sent: how many frames the client has sent so far, and how many gradients; None while the session is being
        opened. Raises Busy when the process is out of descriptors or threads."""
        self._host, self._session, self._sent = host, session, sent or (lambda: (0, 0))
        self._peers = tuple(hop.peer for hop in route.hops)
        self._vigil = Vigil(self._peers, opening=sent is None)
        self._over = threading.Event()
        self.error: P2PModelError | None = None
        self.bell, self._ringer = socket_pair()
        try:
            threading.Thread(target=self._run, name="watch", daemon=True).start()
        except RuntimeError as error:
            self.bell.close()
            self._ringer.close()
            raise Busy(f"Nobody can watch the route: {error}.", "Raise the limit of threads.") from None

    def close(self) -> None:
        self._over.set()
        self.bell.close()

    def _run(self) -> None:
        with self._ringer:
            try:
                self._look_on()
            except Exception as error:
                log.exception("the watch over a route failed")
                self.error = Busy(f"This machine cannot watch the route any more: {type(error).__name__}.")
            if self.error is not None:
                with contextlib.suppress(OSError):  # nobody waits any more
                    self._ringer.send(b"\0")

    def _look_on(self) -> None:
        deaf = 0
        while not self._over.is_set() and self.error is None:
            began = time.monotonic()
            signs = self._round()
            took = time.monotonic() - began
            if isinstance(signs, P2PModelError):
                deaf += 1
                if deaf >= MISSES:
                    self.error = signs
            elif took < PROBE_SECONDS + SLACK_SECONDS:
                deaf = 0
                suspicion = self._vigil.hear(time.monotonic(), signs, *self._sent())
                if suspicion is not None:
                    peer = suspicion.peer
                    self.error = PeerFailed(f"Peer …{peer[-8:]} {suspicion.what}.", peer)
            self._over.wait(max(0.0, ROUND_SECONDS - took) if self.error is None else 0.0)

    def _round(self) -> dict[PeerId, Sign | None] | P2PModelError:
        """Why nobody can be heard, when it is this machine's fault: its daemon is gone, or it is out of descriptors."""
        pongs = probe_all(self._host, self._peers, PROBE_SECONDS, self._session, pings=1)
        if not all(pongs.values()):
            try:
                check_daemon(self._host, PROBE_SECONDS)
            except P2PModelError as error:
                return error
        return {peer: Sign(pong.busy_seconds, pong.progress) if pong else None for peer, pong in pongs.items()}
