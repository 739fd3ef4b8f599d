"""The slots of a parent version end to end, and the patches as rows of that layout."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors.changes import NOT_HELD, EndToEnd, Lazy, part_of

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
Row = F64 | F32

PART = 1 << 15
"""Values of a slot that are looked at at a time: PyTorch gives more of them to several threads, and waiting for those
takes longer than the work, most of all where they have other work to do."""


def fold(rows: F64) -> F64:
    """Sum over the first axis, overwriting it: the second half is added to the first until one row is left, so that
    the order of additions depends on the number of rows alone."""
    total: F64 = folded(rows, 1)[0]
    return total


def folded(rows: F64, most: int) -> F64:
    """The same, until no more than `most` rows are left."""
    n = len(rows)
    while n > most:
        half = (n + 1) // 2
        rows[: n - half] += rows[half:n]
        n = half
    return rows[:n]


class Layout:
    """The slots of the parent, end to end in the order of their names."""

    def __init__(self, parent: Mapping[str, Tensor]) -> None:
        self.places = tuple((name, tuple(parent[name].shape)) for name in sorted(parent))
        *self._starts, self.size = accumulate((prod(shape) for _, shape in self.places), initial=0)
        if not self.size:
            raise Rejected("schema", "The parent version has no slots.")
        wide = any(tensor.dtype == torch.float64 for tensor in parent.values())
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)
        """That holds the values of patches, as they come."""
        self.parent: F64 = np.empty(self.size, np.float64)
        self._fill(self.parent, parent, 0)
        self._start: Row = self.parent.astype(self.dtype)

    def values(self, values: Mapping[str, Tensor], relative: bool, begin: int, end: int) -> Row:
        """Columns [begin, end) of one patch's values or updates, to be read only: a view where they lie end to end.
        What it does not hold is unchanged."""
        return self._row(values, 0.0 if relative else self._start, begin, end)

    def fisher(self, fisher: Mapping[str, Tensor], begin: int, end: int) -> Row:
        """The same of its Fisher, with NOT_HELD."""
        return self._row(fisher, NOT_HELD, begin, end)

    def update(self, values: Mapping[str, Tensor], relative: bool, begin: int, end: int, out: F64 | None = None) -> F64:
        """Columns [begin, end) of one patch's update, the caller's to overwrite."""
        out = np.empty(end - begin, np.float64) if out is None else out
        np.subtract(self.values(values, relative, begin, end), 0.0 if relative else self.parent[begin:end], out=out)
        return out

    def _row(self, tensors: Mapping[str, Tensor], start: Row | float, begin: int, end: int) -> Row:
        if isinstance(tensors, EndToEnd) and tensors.places == self.places:
            whole: Row = tensors.across(begin, end).numpy()
            return whole
        row = np.full(end - begin, start, self.dtype) if isinstance(start, float) else start[begin:end].copy()
        self._fill(row, tensors, begin)
        return row

    def _fill(self, row: Row, tensors: Mapping[str, Tensor], begin: int) -> None:
        """What `tensors` lack is left as it is."""
        end = begin + len(row)
        for index in range(bisect_right(self._starts, begin) - 1, len(self.places)):
            (name, shape), start = self.places[index], self._starts[index]
            if start >= end:
                break
            low, high = max(start, begin), min(start + prod(shape), end)
            if low < high and name in tensors:
                _check_shape(tensors, name, shape)
                for at in range(low, high, PART):
                    stop = min(at + PART, high)
                    row[at - begin : stop - begin] = _array(part_of(tensors, name, at - start, stop - start))

    def split(self, row: F64) -> dict[str, Tensor]:
        parts = torch.split(torch.from_numpy(row), [prod(shape) for _, shape in self.places])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.places, parts, strict=True)}


def _check_shape(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    if (tensors.shape(name) if isinstance(tensors, Lazy) else tuple(tensors[name].shape)) != shape:
        raise Rejected("shape", f"A patch has slot {name} in another shape than its parent.")


def _array(part: Tensor) -> Row:
    part = part.detach().cpu()
    found: Row = (part if part.dtype == torch.float64 else part.float()).numpy()
    return found
