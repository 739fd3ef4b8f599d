"""Pings the hops of a route while somebody waits for it, and says when the wait is in vain.

Nobody pings while steps are fast: a watch begins only after a silence. Its pings run in threads of their own, so that
an answer which comes meanwhile is not held up.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from p2pmodel.domain.errors import P2PModelError, PeerFailed, Unreachable
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import Route
from p2pmodel.logic.vigil import MISSES, Sign, Vigil
from p2pmodel.swarm.ping import probe_all
from p2pmodel.swarm.streams import Host, check_daemon

SILENCE_SECONDS = 1.0
"""Without an answer for so long, a watch begins."""
ROUND_SECONDS = 1.0
PROBE_SECONDS = 1.25
"""For an answer to a ping; with SILENCE_SECONDS and two misses, a stopped peer is noticed after 3.5 s."""
SLACK_SECONDS = 1.0
"""A round that takes so much longer was held up on this machine, which says nothing about others."""


class Watch:
    """A socket to wait on: `bell` becomes readable when `error` is set. Closed by the waiter, at once."""

    def __init__(self, host: Host, route: Route, session: str, sent: Callable[[], tuple[int, int]] | None) -> None:
        """sent: how many frames the client has sent so far, and how many gradients; None while the session is being
        opened."""
        self._host, self._session, self._sent = host, session, sent or (lambda: (0, 0))
        self._peers = tuple(hop.peer for hop in route.hops)
        self._vigil = Vigil(self._peers, opening=sent is None)
        self._over = threading.Event()
        self.error: P2PModelError | None = None
        self.bell, self._ringer = socket.socketpair()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self.bell.close()

    def _run(self) -> None:
        deaf = 0
        with self._ringer:
            while not self._over.is_set() and self.error is None:
                began = time.monotonic()
                signs = self._round()
                took = time.monotonic() - began
                if signs is None:
                    deaf += 1
                    if deaf >= MISSES:
                        self.error = Unreachable("This node's own P2P daemon does not answer.", "Restart the node.")
                elif took < PROBE_SECONDS + SLACK_SECONDS:
                    deaf = 0
                    suspicion = self._vigil.hear(time.monotonic(), signs, *self._sent())
                    if suspicion is not None:
                        peer = suspicion.peer
                        self.error = PeerFailed(f"Peer …{peer[-8:]} {suspicion.what}.", peer)
                self._over.wait(max(0.0, ROUND_SECONDS - took) if self.error is None else 0.0)
            if self.error is not None:
                with contextlib.suppress(OSError):  # nobody waits any more
                    self._ringer.send(b"\0")

    def _round(self) -> dict[PeerId, Sign | None] | None:
        """None when this node's own daemon does not answer, so that nobody else can be heard."""
        pongs = probe_all(self._host, self._peers, PROBE_SECONDS, self._session, pings=1)
        if not all(pongs.values()):
            try:
                check_daemon(self._host, PROBE_SECONDS)
            except Unreachable:
                return None
        return {peer: Sign(pong.busy_seconds, pong.progress) if pong else None for peer, pong in pongs.items()}
