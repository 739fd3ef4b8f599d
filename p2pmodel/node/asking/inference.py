"""A chain that survives its peers: what the client's model calls in place of its layers.

The client keeps the hidden states that it has sent. When a hop fails, it is banned for the session, another route is
found, and what was sent is replayed as one prefill; the caller sees a pause. In fp32 the answer is the same as without
the fault, because prefill and decoding of one stage give the same states.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from p2pmodel.domain.errors import PeerFailed, Rejected, Unreachable
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import MAX_PREFIX_BLOCKS, PREFIX_BLOCK, Route
from p2pmodel.engine.head import NO_VECTORS
from p2pmodel.engine.prefixes import prefix_keys
from p2pmodel.engine.steps import Note
from p2pmodel.node.asking.connecting import PATIENCE_SECONDS, Connector, Wish, demand_finite
from p2pmodel.node.asking.history import History
from p2pmodel.node.asking.tape import RoutedTape
from p2pmodel.swarm.chain_client import ChainSession
from p2pmodel.tensors.blob import pack
from p2pmodel.wire.frames import MAX_BODY_BYTES

log = logging.getLogger(__name__)

CHUNK_TOKENS = 256
"""Of a prefill: while one stage computes a chunk, the stage before computes the next."""
CHUNKS_UNDER_WAY = 4
"""Sent before the first answer is waited for; it bounds what waits at each stage."""


class RoutedChain:
    """Implements `engine.head.RemoteChain`. last: the session that was opened last."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self.last: RoutedSession | None = None
        self._tape: RoutedTape | None = None
        self._abandoned = False

    def open(
        self, max_tokens: int, rows: int, rewinds: bool, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> "RoutedSession":
        state = pack(vectors) if vectors else b""
        session = self.last = RoutedSession(self._connector, Wish(max_tokens, rows, rewinds, state=state))
        if self._abandoned:
            session.abandon()
        return session

    def tape(self) -> RoutedTape:
        if self._tape is None:
            self._tape = RoutedTape(self._connector)
        return self._tape

    def abandon(self) -> None:
        """From any thread: as `RoutedSession.abandon`, of the last session and of all that are opened after it."""
        self._abandoned = True
        if self.last is not None:
            self.last.abandon()

    def close(self) -> None:
        if self._tape is not None:
            self._tape.close()


class RoutedSession:
    """One generation. Implements `engine.head.RemoteSession`. It is opened by its first step, whose beginning the
    stages may know from an earlier session. route: the latest one, None before the first step."""

    def __init__(self, chain: Connector, wish: Wish) -> None:
        self._chain, self._wish = chain, wish
        self._banned: set[PeerId] = set()
        self._history = History()
        self._session: ChainSession | None = None
        self._abandoned = False
        self._earlier_bytes = (0, 0)
        self.route: Route | None = None
        self.failovers = 0
        self.reused_tokens = 0
        self.spread_gates = 0
        """Of experts that nobody hosted: their weight went to others."""
        self.shares: Tensor | None = None
        """[B, E + 1]: what the routers chose of the version's modular experts, and of none, as a mean over the layers;
        None as long as they have not seen enough."""

    @property
    def traffic(self) -> tuple[int, int]:
        """Sent and received, over all routes of the session."""
        sent, received = self._earlier_bytes
        if self._session is None:
            return sent, received
        return sent + self._session.bytes_sent, received + self._session.bytes_received

    def forward(self, hidden: Tensor, position: int, note: Note) -> Tensor:
        """[B, T, H] in, the last layer's output out, of the tokens that are wanted, both float32 on the CPU."""
        self._history.add(hidden, position, note)
        wanted = hidden.shape[1] if note.wanted is None else note.wanted
        try:
            try:
                if self._session is not None:
                    return self._step(hidden, position, note)
                if self._history.tokens > hidden.shape[1]:  # the step before was broken off
                    hidden, note = self._history.replay(wanted)
                return self._begin(hidden, note, 0.0)
            except PeerFailed as error:
                return self._recover(error, wanted)
        except BaseException:
            self._leave_route()  # or what is under way would be taken for the answers to another step
            raise

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _leave_route(self) -> None:
        try:
            self.close()
        finally:
            self._earlier_bytes, self._session = self.traffic, None

    def abandon(self) -> None:
        """From any thread: a step that another one waits in ends with PeerFailed, and no other route is looked for."""
        self._abandoned = True
        self.close()

    def _begin(self, hidden: Tensor, note: Note, patience: float) -> Tensor:
        """The session's first step on a route: all tokens so far."""
        wish = replace(self._wish, prefix=self._prefix(hidden, note))
        self._session = self._chain.connect(wish, self._banned, patience, lambda: self._abandoned)
        if self._abandoned:  # in the meantime: there was nothing to close yet
            raise PeerFailed("The session is closed.")
        self.route, known = self._session.route, self._session.known_tokens
        self.reused_tokens += known
        return self._step(hidden[:, known:], known, note.part(known, hidden.shape[1], hidden.shape[1]))

    def _prefix(self, hidden: Tensor, note: Note) -> tuple[bytes, ...]:
        """Keys of the blocks that nobody wants the output of."""
        if note.mask is not None or note.positions is not None or note.wanted is None or hidden.shape[0] > 1:
            return ()
        if self._wish.state:  # their hidden states are like nobody else's
            return ()
        blocks = min(MAX_PREFIX_BLOCKS, (hidden.shape[1] - max(1, note.wanted)) // PREFIX_BLOCK)
        if not blocks or not self._chain.chunked:
            return ()
        codec = self._chain.codec
        body = codec.encode(hidden[:, : blocks * PREFIX_BLOCK])
        return prefix_keys(body, codec.size(1, hidden.shape[2]))

    def _step(self, hidden: Tensor, position: int, note: Note) -> Tensor:
        """A prefill goes in chunks that follow each other through the stages."""
        assert self._session is not None
        tokens = hidden.shape[1]
        length = self._chunk_length(hidden.shape[2]) if self._chain.chunked else tokens
        chunks = [(start, min(start + length, tokens)) for start in range(0, tokens, length)]
        outputs: list[Tensor] = []
        under_way: deque[int] = deque()
        for start, end in chunks:
            part = hidden[:, start:end]
            body = self._chain.codec.encode(part.reshape(1, -1, part.shape[-1]))
            self._session.send(body, position + start, end - start, note.part(start, end, tokens).encode())
            under_way.append(end - start)
            if len(under_way) == CHUNKS_UNDER_WAY:
                outputs.append(self._receive(under_way.popleft(), hidden))
        outputs.extend(self._receive(count, hidden) for count in under_way)
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _receive(self, tokens: int, like: Tensor) -> Tensor:
        rows, _, width = like.shape
        assert self._session is not None
        codec = self._chain.codec
        meta, body = self._session.receive()
        self._hear(meta, rows, tokens)
        count, size = memoryview(body).nbytes // codec.size(1, width), memoryview(body).nbytes
        if count % rows or count > rows * tokens or codec.size(count, width) != size:
            raise PeerFailed("The layers' answer is not of the size asked for.", self._session.route.hops[-1].peer)
        if not count:
            return like.new_empty(rows, 0, width)
        output = codec.decode(body, count, width).float().view(rows, -1, width)
        demand_finite(output, self._session.route)
        return output

    def _hear(self, meta: bytes, rows: int, tokens: int) -> None:
        assert self._session is not None
        try:
            note = Note.decode(meta, rows, tokens)
            self.spread_gates += note.spread
            if note.shares is not None:
                self.shares = note.shares / max(1, note.routed)
        except Rejected as error:
            raise PeerFailed(
                f"The layers' answer has a malformed note: {error.message}", self._session.route.hops[-1].peer
            ) from None

    def _chunk_length(self, width: int) -> int:
        fits = MAX_BODY_BYTES // (2 * self._chain.codec.size(1, width))
        return max(1, min(CHUNK_TOKENS, fits // self._wish.rows))

    def _recover(self, error: PeerFailed, wanted: int) -> Tensor:
        while True:
            if self._abandoned:
                raise error
            log.warning("%s Another route is being found.", error.message)
            if error.peer:
                self._chain.suspect(PeerId(error.peer))
            if self._session is not None:
                self.failovers += 1
                self._banned |= {PeerId(error.peer)} if error.peer else {hop.peer for hop in self._session.route.hops}
                self._leave_route()
            try:
                hidden, note = self._history.replay(wanted)
                return self._begin(hidden, note, PATIENCE_SECONDS)
            except PeerFailed as again:
                if self._session is None and not again.peer:
                    raise  # no session came about, and nobody can be left out
                error = again
            except Unreachable as gone:
                raise Unreachable(gone.message, f"It began with: {error.message}") from error
