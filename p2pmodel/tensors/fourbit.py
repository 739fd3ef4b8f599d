"""Tensors in four bits a value, for mean gradients and updates: blocks of 64, each with a scale of its own.

A value is its block's scale times a whole number from -7 to 7. The scales are float16, relative to the largest of them,
so that small gradients do not fall out of its range. What rounding takes away can be kept and added the next time
(error feedback: Seide et al., 2014), so that nothing is lost in the long run. 4.25 bits a value.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import EndToEnd, Flat, Places, blocks_of, end_to_end

BLOCK = 64
LARGEST = 7
_PAIRS = np.array([[(code & 15) - 8, (code >> 4) - 8] for code in range(256)], np.float32).view(np.uint64).reshape(-1)
"""Of each byte the two whole numbers that it says, as one number of 64 bits, so that they are looked up at once."""
_NAMES = frozenset(("codes", "scales", "unit"))


def holds(raw: Raw) -> bool:
    """Whether a blob is of four bits a value."""
    return blob.names(raw) == _NAMES


def encode(
    tensors: Mapping[str, Tensor], error: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what the blob holds, the error that was made). error: what the encoding before this one left over.

    Of the tensors end to end in the order of their names, N values: codes uint8 [⌈N / 2⌉], the lower half first; scales
    float16 [⌈N / 64⌉]; unit float32 [1], of the scales. Raises ValueError for values that are not finite.
    """
    flat, places = end_to_end(tensors)
    if error is not None:
        flat = flat + end_to_end(error)[0]
    if not bool(flat.isfinite().all()):
        raise ValueError("only finite values can be encoded")
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1) / LARGEST
    unit = largest.amax().clamp(min=torch.finfo(torch.float32).tiny).view(1)
    scales = (largest / unit).to(torch.float16)
    steps = (scales.float() * unit)[:, None]
    whole = torch.where(steps > 0, blocks / torch.where(steps > 0, steps, 1.0), 0.0).round().clamp(-LARGEST, LARGEST)
    halves = (whole.view(-1)[: len(flat)] + 8).to(torch.uint8)
    halves = torch.nn.functional.pad(halves, (0, len(halves) % 2))
    encoded = {"codes": halves[::2] | (halves[1::2] << 4), "scales": scales, "unit": unit}
    return encoded, dict(Flat(flat - (whole * steps).view(-1)[: len(flat)], places))


class Decoded(EndToEnd):
    """float32 tensors, made where they are looked at, the same bits everywhere."""

    def __init__(self, raw: Raw, places: Places, limit: int) -> None:
        """Keeps what the blob holds. Raises Rejected("size" | "schema" | "shape" | "finite")."""
        super().__init__(places)
        expected = (
            Slot("codes", (-(-self.size // 2),), "uint8"),
            Slot("scales", (-(-self.size // BLOCK),), "float16"),
            Slot("unit", (1,), "float32"),
        )
        found = blob.unpack(raw, expected, limit)
        if found.keys() != _NAMES:
            raise Rejected("schema", "A blob of four bits a value lacks its codes, scales or unit.")
        self._codes = found["codes"].numpy()
        self._steps = (found["scales"].float() * found["unit"]).numpy()
        with np.errstate(over="ignore"):
            farthest = self._steps * np.float32(-8)  # the largest of what four bits can say
        if not np.isfinite(farthest).all() and not bool(self.across(0, self.size).isfinite().all()):
            raise Rejected("finite", "A blob of four bits a value holds what is not finite.")

    def across(self, low: int, high: int) -> Tensor:
        first, last = low // BLOCK, -(-high // BLOCK)
        pairs = np.take(_PAIRS, blocks_of(self._codes, first * BLOCK // 2, last * BLOCK // 2), mode="clip")
        values = pairs.view(np.float32).reshape(-1, BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):  # of what lies beyond the last value, or is refused
            values *= self._steps[first:last, None]
        return torch.from_numpy(values.reshape(-1)[low - first * BLOCK : high - first * BLOCK])
