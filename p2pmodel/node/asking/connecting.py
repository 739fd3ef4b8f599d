"""Sessions on the best route there is: what inference and training over the swarm begin with."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from p2pmodel.domain.errors import Busy, NotRunning, PeerFailed, Unreachable
from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.domain.swarm import Route, SessionRequest
from p2pmodel.swarm.chain_client import ChainClient, ChainSession
from p2pmodel.tensors.codecs import Codec

log = logging.getLogger(__name__)

Stopped = Callable[[], bool]
FindRoute = Callable[[frozenset[PeerId], Stopped], Route]
PATIENCE_SECONDS = 14.0
"""How long a session under way waits for layers that nobody serves any more."""
QUEUE_SECONDS = 30.0
"""How long a new session waits for a peer that has room for it."""


@dataclass(frozen=True)
class Wish:
    """What a session is asked for: see `SessionRequest`. state: a blob of slot tensors that is the session's own, or
    empty."""

    max_tokens: int
    rows: int
    rewinds: bool = False
    prefix: tuple[bytes, ...] = ()
    training: bool = False
    state: bytes = b""


class Connector:
    """`find` blocks, gives the best route without the banned peers, connected to its hops, and raises Unreachable, or
    NotRunning once the function that it is given says that nobody wants the route any more; `suspect` is told who
    failed. chunked: whether the family can take a prefill in parts; stack: the path of its list of layers."""

    def __init__(
        self,
        chain: ChainClient,
        find: FindRoute,
        suspect: Callable[[PeerId], None],
        model: ModelId,
        version: VersionId,
        codec: Codec,
        *,
        chunked: bool,
        stack: str,
    ) -> None:
        self._chain, self._find, self.suspect, self._model, self._version = chain, find, suspect, model, version
        self.codec, self.chunked, self.stack = codec, chunked, stack

    def connect(
        self, wish: Wish, banned: set[PeerId], patience: float, stopped: Stopped = lambda: False
    ) -> ChainSession:
        """A session on the best route; peers that refuse are banned on the way.

        patience: seconds to wait for layers that nobody serves. Peers that have no room are waited for longer. stopped:
        whether nobody wants the session any more; it is asked all the time.

        Raises Unreachable naming the layers; Busy; PeerFailed that names no peer, when nobody could be blamed until the
        patience was over; NotRunning when it was stopped.
        """
        began = time.monotonic()
        tried: set[PeerId] = set(banned)
        full: Busy | None = None
        while True:
            waited = time.monotonic() - began
            if stopped():
                raise NotRunning("The session is closed.")
            session: ChainSession | None = None
            try:
                route = self._find(frozenset(tried), stopped)
                session = self._chain.open(route, self._request(wish, route), stopped=stopped)
                if wish.state:
                    session.send_state(wish.state)
                opened, session = session, None
                return opened
            except PeerFailed as error:
                log.warning("%s", error)
                if isinstance(error.__cause__, Busy):
                    full = error.__cause__
                elif error.peer:
                    self.suspect(PeerId(error.peer))
                if error.peer:
                    tried.add(PeerId(error.peer))
                elif waited > patience:
                    raise
            except Unreachable:
                if full is not None and waited > QUEUE_SECONDS:
                    raise full from None
                if full is None and waited > patience:
                    raise
                tried = set(banned)  # a peer that was merely busy may do now
                time.sleep(0.5)
            finally:
                if session is not None:
                    session.close()

    def _request(self, wish: Wish, route: Route) -> SessionRequest:
        return SessionRequest(
            secrets.token_hex(16),
            self._model,
            self._version,
            self.codec.name,
            route.hops[0].span,
            wish.max_tokens,
            wish.rows,
            wish.rewinds,
            wish.prefix,
            wish.training,
        )


def demand_finite(hidden: Tensor, route: Route) -> None:
    """Raises PeerFailed naming the last peer: no stage hands on what is not finite, and after it comes nobody."""
    if not bool(hidden.isfinite().all()):
        raise PeerFailed("The layers' answer is not finite.", route.hops[-1].peer)
