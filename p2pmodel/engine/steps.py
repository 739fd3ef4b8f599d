"""Notes of steps as tensors: masks of padded rows, their positions, the order of beams."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.modular import MAX_EXPERTS
from p2pmodel.domain.swarm import MicrobatchNote, StepNote
from p2pmodel.wire import canonical
from p2pmodel.wire.frames import MAX_META_BYTES

MAX_LAYERS = 10_000
MAX_SPREAD = 1 << 40
"""Of the gates of a step: in every layer a few of each token."""
_ROUNDING = 1e-3
"""Relative: of a sum of shares over layers, in float32."""


@dataclass(frozen=True, eq=False)
class Note:
    """Shapes: B rows, T tokens of a step. mask [B, T] bool; positions [B, T] int64; order [B] int64; each None where
    there is nothing to say. wanted: of how many of the last tokens the output is needed, None for all; spread, routed:
    as in `StepNote`; shares [B, E + 1] float32: the sum over the `routed` layers."""

    mask: Tensor | None = None
    positions: Tensor | None = None
    order: Tensor | None = None
    wanted: int | None = None
    spread: int = 0
    routed: int = 0
    shares: Tensor | None = None

    def encode(self) -> bytes:
        """The meta of a frame: empty when there is nothing to say, as in most steps."""
        if (
            self.mask is None
            and self.positions is None
            and self.order is None
            and self.wanted is None
            and not self.spread
            and self.shares is None
        ):
            return b""
        return canonical.encode(
            StepNote(
                mask=_packed_mask(self.mask),
                positions=_packed_positions(self.positions),
                order=() if self.order is None else tuple(self.order.tolist()),
                wanted=self.wanted,
                spread=self.spread,
                routed=self.routed,
                shares=b"" if self.shares is None else self.shares.cpu().numpy().astype("<f4").tobytes(),
            )
        )

    @classmethod
    def decode(cls, meta: bytes, rows: int, tokens: int) -> "Note":
        """Raises Rejected("size" | "schema" | "canonical" | "frame"); the last one also for shares that are none."""
        if not meta:
            return NOTHING
        note = canonical.decode(meta, StepNote, MAX_META_BYTES)
        count = rows * tokens
        if (
            not _fits(note, count)
            or len(note.order) not in (0, rows)
            or not all(0 <= row < rows for row in note.order)
            or not (note.wanted is None or 0 <= note.wanted <= tokens)
            or not 0 <= note.spread <= MAX_SPREAD
            or not 0 <= note.routed <= MAX_LAYERS
            or len(note.shares) % (4 * rows)
            or len(note.shares) > 4 * rows * (MAX_EXPERTS + 1)
        ):
            raise Rejected("frame", f"The note of a step does not fit {rows} rows of {tokens} tokens.")
        shares = _unpacked_shares(note.shares, rows)
        if shares is not None and not _are_shares(shares, note.routed):
            raise Rejected("frame", f"The note of a step has shares of experts that {note.routed} layers do not give.")
        return cls(
            mask=_unpacked_mask(note.mask, rows, tokens),
            positions=_unpacked_positions(note.positions, rows, tokens),
            order=torch.tensor(note.order) if note.order else None,
            wanted=note.wanted,
            spread=note.spread,
            routed=note.routed,
            shares=shares,
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


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Shapes: B rows, T tokens. mask [B, T] bool, positions [B, T] int64, or None; inputs: whether the gradient of what
    was sent is wanted."""

    rows: int
    mask: Tensor | None = None
    positions: Tensor | None = None
    inputs: bool = False

    def encode(self) -> bytes:
        """The meta of a frame."""
        return canonical.encode(
            MicrobatchNote(self.rows, self.inputs, _packed_mask(self.mask), _packed_positions(self.positions))
        )

    @classmethod
    def decode(cls, meta: bytes, tokens: int) -> "Microbatch":
        """tokens: B·T. Raises Rejected("size" | "schema" | "canonical" | "frame")."""
        note = canonical.decode(meta, MicrobatchNote, MAX_META_BYTES)
        each, rest = divmod(tokens, note.rows)
        if rest or not each or not _fits(note, tokens):
            raise Rejected("frame", f"The note of a micro-batch does not fit its {tokens} tokens.")
        mask, positions = (
            _unpacked_mask(note.mask, note.rows, each),
            _unpacked_positions(note.positions, note.rows, each),
        )
        return cls(note.rows, mask, positions, note.inputs)


def _fits(note: StepNote | MicrobatchNote, tokens: int) -> bool:
    return len(note.mask) in (0, (tokens + 7) // 8) and len(note.positions) in (0, 4 * tokens)


def _packed_mask(mask: Tensor | None) -> bytes:
    return b"" if mask is None else np.packbits(mask.numpy()).tobytes()


def _unpacked_mask(packed: bytes, rows: int, tokens: int) -> Tensor | None:
    if not packed:
        return None
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=rows * tokens)
    return torch.from_numpy(bits.astype(bool)).view(rows, tokens)


def _packed_positions(positions: Tensor | None) -> bytes:
    return b"" if positions is None else positions.numpy().astype("<i4").tobytes()


def _unpacked_shares(packed: bytes, rows: int) -> Tensor | None:
    return torch.from_numpy(np.frombuffer(packed, "<f4").copy()).view(rows, -1) if packed else None


def _are_shares(shares: Tensor, routed: int) -> bool:
    """shares [B, E + 1]. NaN is neither; no sum of what is in range is infinite."""
    return bool((shares >= 0).all() and (shares.sum(1) <= routed * (1 + _ROUNDING)).all())


def _unpacked_positions(packed: bytes, rows: int, tokens: int) -> Tensor | None:
    if not packed:
        return None
    return torch.from_numpy(np.frombuffer(packed, "<i4").astype(np.int64)).view(rows, tokens)
