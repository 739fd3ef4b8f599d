"""Gradients through the swarm: the client's end of a session that trains, which survives its peers.

A forward is cut into micro-batches of rows, which follow each other through the stages, and so do their gradients on
the way back. The client keeps what it sent: when a peer fails, another route is found and the forward is done again,
so a death costs a step, not the training.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from p2pmodel.domain.errors import InvalidInput, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.swarm import MAX_ROWS, Route
from p2pmodel.engine.steps import Microbatch
from p2pmodel.engine.tuning import split_gradients
from p2pmodel.engine.versions import slot_layer
from p2pmodel.node.asking.connecting import PATIENCE_SECONDS, Connector, Wish, demand_finite
from p2pmodel.swarm.chain_client import ChainSession
from p2pmodel.tensors.blob import pack
from p2pmodel.wire.frames import MAX_BODY_BYTES

T = TypeVar("T")
log = logging.getLogger(__name__)

MICROBATCH_TOKENS = 256
"""At least so many go together: with fewer, a stage's matrix products are slower by the token."""
MOST_MICROBATCHES = 8
"""Of one forward: enough that the stages of a usual route compute at the same time."""
STEP_SECONDS = 600.0
"""For a micro-batch's answer. Peers that stand still are noticed within seconds, whatever this is."""
MOST_FAILURES, SAME_FAILURES = 8, 3
"""Of one step, in all and by the same peer for the same reason, before it is given up."""
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.5, 8.0
"""Between two attempts; the first one after a failure comes at once."""


@dataclass(eq=False)
class Ticket:
    """A forward whose gradients may be asked for. session: where its micro-batches are kept, by their numbers."""

    hidden: Tensor
    parts: list[Microbatch]
    shapes: dict[str, tuple[int, ...]]
    state: bytes
    session: ChainSession | None = None
    numbers: list[int] = field(default_factory=list)


class RoutedTape:
    """Implements `engine.head.RemoteTape`. Thread-safe: one forward or backward pass at a time."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._lock = threading.Lock()
        self._session: ChainSession | None = None
        self._max_tokens = 0
        self._loaded: bytes = b""
        self._number = 0
        self.failovers = 0

    @property
    def session(self) -> ChainSession | None:
        """The one that is open, for those who want to see its route and traffic."""
        return self._session

    def forward(self, hidden: Tensor, microbatch: Microbatch, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Ticket]:
        """See `RemoteTape`. Raises InvalidInput for a row that does not fit into a frame, Unreachable, and PeerFailed
        for a step that goes on failing."""
        by_row = any(vector.ndim > 1 for vector in vectors.values())
        state = pack({name: vectors[name] for name in sorted(vectors)}) if vectors else b""
        with self._lock:
            ticket = Ticket(hidden, [], {name: tuple(vector.shape) for name, vector in vectors.items()}, state)
            ticket.parts = self._split(ticket, microbatch, by_row=by_row)
            return self._persist(lambda: self._forward(ticket)), ticket

    def backward(self, ticket: Ticket, gradient: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See `RemoteTape`. Raises Unreachable, and PeerFailed for a step that goes on failing."""
        with self._lock:
            return self._persist(lambda: self._backward(ticket, gradient))

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _forward(self, ticket: Ticket) -> Tensor:
        session = self._connected(ticket.hidden.shape[1])
        if ticket.state != self._loaded:
            session.send_state(ticket.state, STEP_SECONDS)
            self._loaded = ticket.state
        codec, width = self._connector.codec, ticket.hidden.shape[2]
        ticket.session, ticket.numbers = session, []
        for part, hidden in zip(ticket.parts, _rows(ticket, ticket.hidden), strict=True):
            self._number += 1
            ticket.numbers.append(self._number)
            body = codec.encode(hidden.reshape(1, -1, width))
            session.send(body, self._number, hidden.shape[1], part.encode(), STEP_SECONDS)
        outputs = []
        for hidden in _rows(ticket, ticket.hidden):
            _, body = session.receive(STEP_SECONDS)
            count = hidden.shape[0] * hidden.shape[1]
            if memoryview(body).nbytes != codec.size(count, width):
                raise PeerFailed("The layers' answer is not of the size asked for.", session.route.hops[-1].peer)
            outputs.append(codec.decode(body, count, width).float().view(hidden.shape))
            demand_finite(outputs[-1], session.route)
        return torch.cat(outputs)

    def _backward(self, ticket: Ticket, gradient: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self._session is None or ticket.session is not self._session:
            self._forward(ticket)
        session, codec = self._session, self._connector.codec
        assert session is not None
        width = ticket.hidden.shape[2]
        shapes = self._returning(ticket.shapes, session.route)
        for number, part in zip(ticket.numbers, _rows(ticket, gradient), strict=True):
            session.send_gradient(codec.encode(part.reshape(1, -1, width)), number, STEP_SECONDS)
        inputs: list[Tensor] = []
        total = {name: torch.zeros(shape) for name, shape in ticket.shapes.items()}
        for note, part in zip(ticket.parts, _rows(ticket, gradient), strict=True):
            body = session.receive_gradient(STEP_SECONDS)
            shape = (part.shape[0], part.shape[1], width) if note.inputs else None
            try:
                hidden, own = split_gradients(body, codec, shape, shapes)
            except Rejected as error:
                raise PeerFailed(error.message, session.route.hops[0].peer) from None
            inputs += [] if hidden is None else [hidden]
            for name, value in own.items():
                total[name] += value
        return torch.cat(inputs) if inputs else None, total

    def _connected(self, tokens: int) -> ChainSession:
        if self._session is not None and tokens > self._max_tokens:
            self.close()
        if self._session is None:
            wish = Wish(tokens, MAX_ROWS, training=True)
            self._session = self._connector.connect(wish, set(), PATIENCE_SECONDS)
            self._max_tokens, self._loaded = tokens, b""
        return self._session

    def _persist(self, attempt: Callable[[], T]) -> T:
        """Until it succeeds, on another route each time. Who failed is avoided for a while, where there is somebody
        else. Raises what the last attempt failed by, when it is likely to fail so again."""
        failures: Counter[tuple[str, str]] = Counter()
        while True:
            try:
                return attempt()
            except PeerFailed as error:
                self.close()
                if error.peer:
                    self._connector.suspect(PeerId(error.peer))
                failures[error.peer, error.message] += 1
                tries = failures.total()
                if tries >= MOST_FAILURES or failures[error.peer, error.message] >= SAME_FAILURES:
                    raise
                log.warning("%s The step is done again on another route.", error.message)
                self.failovers += 1
            except BaseException:
                self.close()  # or what is under way would be taken for the answers to another step
                raise
            if tries > 1:
                time.sleep(min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (tries - 2)))

    def _split(self, ticket: Ticket, whole: Microbatch, *, by_row: bool) -> list[Microbatch]:
        """Vectors by row travel with all the rows that they are for."""
        rows, tokens, width = ticket.hidden.shape
        room = (MAX_BODY_BYTES - len(ticket.state)) // (tokens * self._connector.codec.size(1, width))
        usual = max(-(-rows // MOST_MICROBATCHES), -(-MICROBATCH_TOKENS // tokens))
        each = rows if by_row else min(rows, room, usual)
        if not 1 <= each <= min(room, MAX_ROWS):
            raise InvalidInput(
                f"{rows if by_row else 1} rows of {tokens} tokens do not fit into a message.", "Use shorter sequences."
            )
        return [_part(whole, start, min(start + each, rows)) for start in range(0, rows, each)]

    def _returning(self, shapes: Mapping[str, tuple[int, ...]], route: Route) -> dict[str, tuple[int, ...]]:
        """The vectors in the order in which the stages add their gradients: the last stage first."""
        layers = {name: slot_layer(name, self._connector.stack) for name in sorted(shapes)}
        strangers = [name for name, layer in layers.items() if layer is None]
        if strangers:
            raise InvalidInput(f"{strangers[0][:128]!r} is no slot of a layer.", "Only vectors of layers are trained.")
        return {
            name: shapes[name]
            for hop in reversed(route.hops)
            for name, layer in layers.items()
            if layer is not None and layer in hop.span
        }


def _part(whole: Microbatch, start: int, end: int) -> Microbatch:
    return Microbatch(
        end - start,
        None if whole.mask is None else whole.mask[start:end],
        None if whole.positions is None else whole.positions[start:end],
        whole.inputs,
    )


def _rows(ticket: Ticket, whole: Tensor) -> list[Tensor]:
    return list(torch.split(whole, [part.rows for part in ticket.parts]))
