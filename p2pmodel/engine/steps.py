"""Notes of steps as tensors: masks of padded rows, their positions, the order of beams."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.swarm import StepNote
from p2pmodel.wire import canonical
from p2pmodel.wire.frames import MAX_META_BYTES


@dataclass(frozen=True, eq=False)
class Note:
    """Shapes: B rows, T tokens of a step. mask [B, T] bool; positions [B, T] int64; order [B] int64; each None where
    there is nothing to say. wanted: of how many of the last tokens the output is needed, None for all."""

    mask: Tensor | None = None
    positions: Tensor | None = None
    order: Tensor | None = None
    wanted: int | None = None

    def encode(self) -> bytes:
        """The meta of a frame: empty when there is nothing to say, as in most steps."""
        if self.mask is None and self.positions is None and self.order is None and self.wanted is None:
            return b""
        return canonical.encode(
            StepNote(
                mask=b"" if self.mask is None else np.packbits(self.mask.numpy()).tobytes(),
                positions=b"" if self.positions is None else self.positions.numpy().astype("<i4").tobytes(),
                order=() if self.order is None else tuple(self.order.tolist()),
                wanted=self.wanted,
            )
        )

    @classmethod
    def decode(cls, meta: bytes, rows: int, tokens: int) -> "Note":
        """Raises Rejected("size" | "schema" | "canonical" | "frame")."""
        if not meta:
            return NOTHING
        note = canonical.decode(meta, StepNote, MAX_META_BYTES)
        count = rows * tokens
        if (
            len(note.mask) not in (0, (count + 7) // 8)
            or len(note.positions) not in (0, 4 * count)
            or len(note.order) not in (0, rows)
            or not all(0 <= row < rows for row in note.order)
            or not (note.wanted is None or 0 <= note.wanted <= tokens)
        ):
            raise Rejected("frame", f"The note of a step does not fit {rows} rows of {tokens} tokens.")
        bits = np.unpackbits(np.frombuffer(note.mask, np.uint8), count=count) if note.mask else None
        numbers = np.frombuffer(note.positions, "<i4").astype(np.int64) if note.positions else None
        return cls(
            mask=None if bits is None else torch.from_numpy(bits.astype(bool)).view(rows, tokens),
            positions=None if numbers is None else torch.from_numpy(numbers).view(rows, tokens),
            order=torch.tensor(note.order) if note.order else None,
            wanted=note.wanted,
        )

    def part(self, start: int, end: int, tokens: int) -> "Note":
        """Of the tokens [start, end) of this step's `tokens`, as a step of their own."""
        after = tokens - end
        return Note(
            None if self.mask is None else self.mask[:, start:end],
            None if self.positions is None else self.positions[:, start:end],
            self.order if start == 0 else None,
            None if self.wanted is None else min(end - start, max(0, self.wanted - after)),
        )


NOTHING = Note()
