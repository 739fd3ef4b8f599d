"""A chain that survives its peers: what the client's model calls in place of its layers.

The client keeps the hidden states that it has sent. When a hop fails, it is banned for the session, another route is
found, and what was sent is replayed as one prefill; the caller sees a pause. In fp32 the answer is the same as without
the fault, because prefill and decoding of one stage give the same states.
"""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from p2pmodel.domain.errors import PeerFailed, Unreachable
from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.domain.swarm import Route
from p2pmodel.swarm.chain_client import ChainClient, ChainSession
from p2pmodel.tensors.codecs import Codec

log = logging.getLogger(__name__)

FindRoute = Callable[[frozenset[PeerId]], Route]
PATIENCE_SECONDS = 15.0
"""How long a session under way waits for layers that nobody serves any more."""


class RoutedChain:
    """Opens sessions for `engine.head`. `find` blocks, gives the best route without the banned peers, connected to its
    hops, and raises Unreachable."""

    def __init__(self, chain: ChainClient, find: FindRoute, model: ModelId, version: VersionId, codec: Codec) -> None:
        self._chain, self._find, self._model, self._version, self._codec = chain, find, model, version, codec
        self.last: RoutedSession | None = None

    def open(self, max_tokens: int) -> "RoutedSession":
        self.last = RoutedSession(self, max_tokens)
        return self.last

    def connect(self, banned: set[PeerId], max_tokens: int, patience: float) -> ChainSession:
        """A session on the best route; peers that refuse are banned on the way.

        patience: seconds to wait for layers that nobody serves. Raises Unreachable, naming them.
        """
        deadline = time.monotonic() + patience
        tried: set[PeerId] = set(banned)
        while True:
            try:
                route = self._find(frozenset(tried))
                return self._chain.open(route, self._model, self._version, self._codec.name, max_tokens)
            except PeerFailed as error:
                log.warning("%s", error)
                if error.peer:
                    tried.add(PeerId(error.peer))
                if time.monotonic() > deadline and not error.peer:
                    raise
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
                tried = set(banned)  # a peer that was merely busy may do now
                time.sleep(0.5)

    @property
    def codec(self) -> Codec:
        return self._codec


class RoutedSession:
    """One generation. Implements `engine.head.RemoteSession`."""

    def __init__(self, chain: RoutedChain, max_tokens: int) -> None:
        self._chain, self._max_tokens = chain, max_tokens
        self._banned: set[PeerId] = set()
        self._sent: list[Tensor] = []
        self._session = chain.connect(self._banned, max_tokens, 0.0)
        self._earlier_bytes = (0, 0)
        self.failovers = 0

    @property
    def route(self) -> Route:
        return self._session.route

    @property
    def bytes(self) -> tuple[int, int]:
        """Sent and received, over all routes of the session."""
        return self._earlier_bytes[0] + self._session.bytes_sent, self._earlier_bytes[1] + self._session.bytes_received

    def forward(self, hidden: Tensor, position: int) -> Tensor:
        """[1, T, H] in, the last layer's output [1, T, H] out, both float32 on the CPU."""
        self._sent.append(hidden)
        try:
            return self._step(hidden, position)
        except PeerFailed as error:
            return self._recover(error, hidden.shape[1])

    def _step(self, hidden: Tensor, position: int) -> Tensor:
        tokens, width = hidden.shape[1], hidden.shape[2]
        _, body = self._session.step(self._chain.codec.encode(hidden), position, tokens)
        return self._chain.codec.decode(body, tokens, width)

    def _recover(self, error: PeerFailed, tokens: int) -> Tensor:
        history = torch.cat(self._sent, dim=1)
        while True:
            log.warning("%s Another route is being found.", error.message)
            self.failovers += 1
            self._banned |= {PeerId(error.peer)} if error.peer else {hop.peer for hop in self.route.hops}
            self.close()
            self._earlier_bytes = self.bytes
            self._session = self._chain.connect(self._banned, self._max_tokens, PATIENCE_SECONDS)
            try:
                return self._step(history, 0)[:, -tokens:]
            except PeerFailed as again:
                error = again

    def close(self) -> None:
        self._session.close()
