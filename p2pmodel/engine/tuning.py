"""Sessions that train, from bytes to bytes: micro-batches forward, gradients back.

The body of a GRADIENT frame is the encoded gradient of the hidden states [B, T, H], then of each stage that it has come
through, the last stage first, the gradients of the session's own vectors: float32, in the order of their names. Every
stage takes off the first part and puts its own in its place; behind the rest it adds what is its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import SessionRequest
from p2pmodel.engine.stage import Stage
from p2pmodel.engine.steps import Microbatch
from p2pmodel.engine.tape import Reel, Tape
from p2pmodel.engine.vectors import SessionVectors
from p2pmodel.tensors.codecs import Codec
from p2pmodel.wire.frames import MAX_BODY_BYTES


@dataclass(eq=False, slots=True)
class TrainingSession:
    """state: of its version; own: the session's own vectors over it, as last loaded."""

    codec: Codec
    state: Mapping[str, Tensor]
    max_tokens: int
    max_rows: int
    reel: Reel
    version: VersionId
    own: dict[str, Tensor] = field(default_factory=dict)


class Tuner:
    """What a `Runner` does for sessions that train. The thread that computes owns it, but for `open`."""

    def __init__(self, stage: Stage, vectors: SessionVectors, max_bytes: int) -> None:
        self._stage, self._vectors = stage, vectors
        self._tape = Tape(stage, max_bytes)

    @property
    def held_bytes(self) -> int:
        """Of micro-batches that wait for their gradients: graphs, and what they began with."""
        return self._tape.held_bytes

    def open(self, request: SessionRequest, codec: Codec, state: Mapping[str, Tensor]) -> TrainingSession:
        return TrainingSession(codec, state, request.max_tokens, request.rows, Reel(request.span), request.version)

    def load(self, session: TrainingSession, body: Buffer) -> None:
        """As `SessionVectors.read`. Micro-batches that are under way keep the vectors that they began with."""
        session.own = self._vectors.read(body, session.reel.span, by_row=True)

    def forward(self, session: TrainingSession, number: int, meta: bytes, body: Buffer) -> Buffer:
        """Raises Rejected("frame" | "finite" | "memory" | …)."""
        width, size = self._stage.width, memoryview(body).nbytes
        count = size // session.codec.size(1, width)
        if not count or session.codec.size(count, width) != size:
            raise Rejected("frame", f"A micro-batch of {size} bytes holds no hidden states of width {width}.")
        note = Microbatch.decode(meta, count)
        tokens = count // note.rows
        if tokens > session.max_tokens or note.rows > session.max_rows:
            raise Rejected("frame", f"A micro-batch of {note.rows} rows of {tokens} tokens is larger than was agreed.")
        if any(t.ndim == 2 and len(t) != note.rows for t in session.own.values()):
            raise Rejected("frame", f"The session's vectors are for another number of rows than {note.rows}.")
        hidden = _decoded(session.codec, body, note.rows, tokens, width)
        output = self._tape.forward(
            session.reel, number, hidden, note, {**session.state, **session.own}, tuple(session.own)
        )
        return session.codec.encode(output.reshape(1, -1, width))

    def backward(self, session: TrainingSession, number: int, body: Buffer) -> Buffer:
        """Raises NotFound for a micro-batch that is not kept any more, Rejected("frame" | "finite")."""
        rows, tokens, width = self._tape.shape(session.reel, number)
        view = memoryview(body).cast("B")
        size = session.codec.size(rows * tokens, width)
        if view.nbytes < size:
            raise Rejected("frame", f"The gradient of a micro-batch has {view.nbytes} bytes, fewer than {size}.")
        gradient = _decoded(session.codec, view[:size], rows, tokens, width)
        inputs, own = self._tape.backward(session.reel, number, gradient)
        parts: list[Buffer] = [] if inputs is None else [session.codec.encode(inputs.reshape(1, -1, width))]
        parts.append(view[size:])
        parts.extend(grad.cpu().contiguous().view(-1).numpy().data for grad in own)
        answer = b"".join(parts)
        if len(answer) > MAX_BODY_BYTES:
            raise Rejected("frame", f"Gradients of {len(answer)} bytes are more than a frame holds.")
        return answer

    def close(self, session: TrainingSession) -> None:
        self._tape.forget(session.reel)


def split_gradients(
    body: Buffer, codec: Codec, hidden: tuple[int, int, int] | None, own: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What the first stage answered: the gradient of what was sent, float32 [B, T, H], when `hidden` gives its shape,
    and those of the vectors. own: their shapes, in the order in which the stages add them.

    Raises Rejected("frame" | "finite").
    """
    view = memoryview(body).cast("B")
    at = 0 if hidden is None else codec.size(hidden[0] * hidden[1], hidden[2])
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in own.items()}
    if view.nbytes != at + sum(sizes.values()):
        raise Rejected("frame", f"An answer of {view.nbytes} bytes does not hold the gradients that were asked for.")
    inputs = None if hidden is None else _decoded(codec, view[:at], *hidden).float()
    gradients = {}
    for name, shape in own.items():
        raw = np.frombuffer(view[at : at + sizes[name]], "<f4").copy()
        gradients[name] = torch.from_numpy(raw).view(shape)
        at += sizes[name]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
        raise Rejected("finite", "The gradients that came back are not finite.")
    return inputs, gradients


def _decoded(codec: Codec, body: Buffer, rows: int, tokens: int, width: int) -> Tensor:
    hidden = codec.decode(body, rows * tokens, width)
    if not bool(hidden.sum(dtype=torch.float32).isfinite()):
        raise Rejected("finite", "The hidden states or gradients of a micro-batch are not finite.")
    return hidden.view(rows, tokens, width)
