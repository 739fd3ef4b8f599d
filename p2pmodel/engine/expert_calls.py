"""The bodies of frames between a trunk and its expert hosts.

    rows, in the connection's codec · gradients of the answer, in the same · u16 row of each pair · u16 expert of each
    pair · f32 gate of each pair

The answer is a row for every row: the sum over its pairs of gate times what the expert makes of the row. With
gradients it is theirs instead: of the rows, in the codec, and of the gates, f32. Numbers are little-endian.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.experts import MAX_CALL_PAIRS, MAX_CALL_ROWS, ExpertCall
from p2pmodel.domain.ports import Buffer
from p2pmodel.tensors.codecs import Codec
from p2pmodel.wire.frames import MAX_BODY_BYTES


@dataclass(frozen=True, eq=False)
class Pairs:
    """What goes to which expert. Shapes: P pairs. row [P] int64, into the rows beside it; expert [P] int64, by its
    number in the layer; gate [P] float32."""

    row: Tensor
    expert: Tensor
    gate: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def encode(self) -> bytes:
        row, expert = (t.cpu().numpy().astype("<u2").tobytes() for t in (self.row, self.expert))
        return row + expert + self.gate.detach().float().cpu().numpy().astype("<f4").tobytes()


PAIR_BYTES = 8
GATE_BYTES = 4
"""Of a gate's gradient."""


def max_call_bytes(codec: Codec, width: int) -> int:
    """Of the largest body that a host takes: rows and gradients of width `width`."""
    return min(MAX_BODY_BYTES, 2 * codec.size(MAX_CALL_ROWS, width) + PAIR_BYTES * MAX_CALL_PAIRS)


def answer_bytes(codec: Codec, call: ExpertCall, width: int) -> int:
    """Of the body that answers it."""
    return codec.size(call.rows, width) + (GATE_BYTES * call.pairs if call.gradients else 0)


def encode_call(codec: Codec, rows: Tensor, pairs: Pairs, gradients: Tensor | None = None) -> bytes:
    """rows, gradients [R, H]."""
    parts = [codec.encode(rows.unsqueeze(0))]
    if gradients is not None:
        parts.append(codec.encode(gradients.unsqueeze(0)))
    return b"".join([*parts, pairs.encode()])


def decode_call(codec: Codec, call: ExpertCall, body: Buffer, width: int) -> tuple[Tensor, Tensor | None, Pairs]:
    """Rows [R, H], the gradients of the answer where they are there, and the pairs.

    Raises Rejected("shape" | "finite"): of what is wrong with the call whatever the host.
    """
    view, size = memoryview(body).cast("B"), codec.size(call.rows, width)
    tensors = 2 if call.gradients else 1
    if view.nbytes != tensors * size + PAIR_BYTES * call.pairs:
        raise Rejected("shape", f"A call of {view.nbytes} bytes holds no {call.rows} rows of width {width}.")
    rows = codec.decode(view[:size], call.rows, width)[0]
    gradients = codec.decode(view[size : 2 * size], call.rows, width)[0] if call.gradients else None
    tail = bytes(view[tensors * size :])
    row, expert = (
        torch.from_numpy(np.frombuffer(tail, "<u2", call.pairs, offset).astype(np.int64))
        for offset in (0, 2 * call.pairs)
    )
    gate = torch.from_numpy(np.frombuffer(tail, "<f4", call.pairs, 4 * call.pairs).astype(np.float32))
    if int(row.max()) >= call.rows:
        raise Rejected("shape", "A call names a row that it does not have.")
    if not all(is_finite(t) for t in (rows, gate, *(() if gradients is None else (gradients,)))):
        raise Rejected("finite", "The rows or gates of a call are not finite.")
    return rows, gradients, Pairs(row, expert, gate)


def encode_gradients(codec: Codec, rows: Tensor, gates: Tensor) -> bytes:
    """rows [R, H]; gates [P]."""
    return bytes(codec.encode(rows.unsqueeze(0))) + gates.detach().float().cpu().numpy().astype("<f4").tobytes()


def decode_answer(codec: Codec, call: ExpertCall, body: Buffer, width: int) -> tuple[Tensor, Tensor | None]:
    """Rows [R, H], float32, and the gates' gradients [P] where they were asked for; they need not be finite. Raises
    Rejected("shape")."""
    view, size = memoryview(body).cast("B"), codec.size(call.rows, width)
    if view.nbytes != answer_bytes(codec, call, width):
        raise Rejected("shape", f"An answer of {view.nbytes} bytes holds no {call.rows} rows of width {width}.")
    rows, gates = codec.decode(view[:size], call.rows, width)[0].float(), None
    if call.gradients:
        gates = torch.from_numpy(np.frombuffer(bytes(view[size:]), "<f4").astype(np.float32))
    return rows, gates


def is_finite(t: Tensor) -> bool:
    """In one pass: infinities and NaNs stay in a sum."""
    return bool(t.sum(dtype=torch.float64).isfinite())


def finite_rows(t: Tensor) -> Tensor:
    """[R] bool, of [R, N]; as `is_finite`."""
    return t.sum(1, dtype=torch.float64).isfinite()
