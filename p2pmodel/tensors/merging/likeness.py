"""How much the updates of patches point the same way, from a sketch of each.

A sketch is the update's sum, with signs, in WIDTH buckets (the count sketch of Charikar, Chen & Farach-Colton, 2002):
which bucket and sign a value has depends on its place alone. So it takes a few kilobytes whatever the update takes, one
patch is looked at after the other, and every machine gets the same bits. An angle between two sketches is that between
the updates to within a few per cent of itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.ids import PatchId
from p2pmodel.tensors.changes import Change
from p2pmodel.tensors.merging.layout import F64, Layout, fold

WIDTH = 512
_COLUMNS = 1 << 20
"""Of an update that are looked at at a time. It does not change the result."""


class Sketches:
    def __init__(self, parent: Mapping[str, Tensor], patches: Iterable[tuple[PatchId, Change]]) -> None:
        """parent: that all of them change. Raises Rejected."""
        self.lengths: dict[PatchId, float] = {}
        """Of the updates, about."""
        self._unit: dict[PatchId, F64] = {}
        layout: Layout | None = None
        for patch, change in patches:
            layout = layout or Layout(parent)
            sketch = _sketch(layout, change)
            length = np.sqrt(fold(np.square(sketch)))
            self.lengths[patch] = float(length)
            self._unit[patch] = sketch / length if length > 0 else sketch

    def cosines(self, patch: PatchId, others: Sequence[PatchId]) -> list[float]:
        """Of the angles between its update and theirs; 0 for one that changes nothing, or that is not known here."""
        if not others:
            return []
        nothing: F64 = np.zeros(WIDTH, np.float64)
        rows = np.stack([self._unit.get(other, nothing) for other in others], axis=1)
        rows *= self._unit.get(patch, nothing)[:, None]
        found: list[float] = fold(rows).tolist()
        return found


def _sketch(layout: Layout, change: Change) -> F64:
    """[WIDTH] float64."""
    sums: F64 = np.zeros(WIDTH, np.float64)
    for begin in range(0, layout.size, _COLUMNS):
        end = min(begin + _COLUMNS, layout.size)
        update = layout.update(change.values, change.relative, begin, end)
        buckets, signs = _places(begin, end)
        np.add.at(sums, buckets, update * signs)  # one by one, in their order
    return sums


@lru_cache(maxsize=1)
def _places(begin: int, end: int) -> tuple[NDArray[np.intp], F64]:
    """(bucket, sign) of each value, as SplitMix64 mixes the bits of its place (Steele, Lea & Flood, 2014)."""
    bits = np.arange(begin, end, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    signs: F64 = np.where(bits >> np.uint64(63), -1.0, 1.0)
    return (bits % np.uint64(WIDTH)).astype(np.intp), signs
