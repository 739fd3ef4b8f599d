"""Fishers in one byte a value, on a logarithmic scale.

A Fisher spans many orders of magnitude, and a merge needs no more of it than some percent of each value. A code 1 to
255 stands for its block's largest value times 2^-((255 - code) / 8): 31 octaves, in steps of 9 %, so at most 4.5 % off.
Code 0 is zero, and nothing else is: what is smaller than the scale reaches has code 1, since a mass of nothing would
take its owner out of the merge.

Decoding gives the same bits everywhere: one multiplication in float64 and one rounding a value.
"""

from collections.abc import Mapping
from math import ldexp

import numpy as np
import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import EndToEnd, Places, blocks_of, end_to_end

BLOCK = 1024
_STEPS = 8
# 2^(-k/8), to the last bit of a float64, for the library's own exp2 may differ between machines.
_OCTAVE = (
    1.0,
    0.9170040432046712,
    0.8408964152537145,
    0.7711054127039704,
    0.7071067811865476,
    0.6484197773255048,
    0.5946035575013605,
    0.5452538663326288,
)
_TABLE = np.array([0.0] + [ldexp(_OCTAVE[below % _STEPS], -(below // _STEPS)) for below in range(254, -1, -1)])


def encode(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values that are finite and not negative -> what the blob holds: codes uint8 [N], end to end in the order of the
    names, and scales float32 [⌈N / BLOCK⌉]."""
    flat, _ = end_to_end(fisher)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(1) + 0.0  # no zero with a sign
    ratios = blocks.double() / torch.where(scales > 0, scales, 1.0).double()[:, None]
    below = (-_STEPS * torch.log2(ratios)).clamp(0, 254).round()
    codes = torch.where(blocks > 0, 255 - below, 0.0).to(torch.uint8)
    return {"codes": codes.view(-1)[: len(flat)].clone(), "scales": scales}


class Decoded(EndToEnd):
    """float32 tensors, made where they are looked at."""

    def __init__(self, raw: Raw, places: Places, limit: int) -> None:
        """Keeps what the blob holds. Raises Rejected("size" | "schema" | "shape" | "finite")."""
        super().__init__(places)
        expected = (Slot("codes", (self.size,), "uint8"), Slot("scales", (-(-self.size // BLOCK),), "float32"))
        found = blob.unpack(raw, expected, limit)
        if found.keys() != {slot.name for slot in expected}:
            raise Rejected("schema", "The patch's Fisher lacks its codes or scales.")
        self._codes, self._scales = found["codes"].numpy(), found["scales"].numpy()
        if np.signbit(self._scales).any():
            raise Rejected("finite", "The patch's Fisher has negative values.")

    def across(self, low: int, high: int) -> Tensor:
        first, last = low // BLOCK, -(-high // BLOCK)
        values = np.take(_TABLE, blocks_of(self._codes, first * BLOCK, last * BLOCK), mode="clip").reshape(-1, BLOCK)
        values *= self._scales[first:last].astype(np.float64)[:, None]
        flat = values.astype(np.float32).reshape(-1)
        return torch.from_numpy(flat[low - first * BLOCK : high - first * BLOCK])
