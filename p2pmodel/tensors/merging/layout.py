"""The slots of a parent version end to end, and the patches as rows of that layout."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors.blob import Tensors
from p2pmodel.tensors.changes import NOT_HELD, Lazy
from p2pmodel.tensors.merging.contributions import Contribution, Contributions

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
Row = F64 | F32
Measure = Callable[[F64], F64]
"""Updates [B, N] of some patches -> a figure for each, [B]."""


def fold(rows: F64) -> F64:
    """Sum over the first axis, overwriting it: the second half is added to the first until one row is left, so that
    the order of additions depends on the number of rows alone."""
    n = len(rows)
    while n > 1:
        half = (n + 1) // 2
        rows[: n - half] += rows[half:n]
        n = half
    total: F64 = rows[0]
    return total


def norms(updates: F64) -> F64:
    """Euclidean, of each row."""
    found: F64 = np.sqrt(fold(np.square(updates.T)))
    return found


def updates_of(values: Row, parent: F64, relative: NDArray[np.bool_]) -> F64:
    """[P, C]: of values, and of what are updates already; the caller's to overwrite."""
    if not relative.any():
        return values - parent
    updates = values.astype(np.float64)
    updates[~relative] -= parent
    return updates


class Layout:
    """The slots of the parent, end to end in the order of their names."""

    def __init__(self, parent: Mapping[str, Tensor]) -> None:
        self.places = tuple((name, tuple(parent[name].shape)) for name in sorted(parent))
        self.size = sum(prod(shape) for _, shape in self.places)
        if not self.size:
            raise Rejected("schema", "The parent version has no slots.")
        wide = any(tensor.dtype == torch.float64 for tensor in parent.values())
        self.parent: F64 = np.empty(self.size, np.float64)
        self._fill(self.parent, parent, 0)
        self._start: Row = self.parent if wide else self.parent.astype(np.float32)

    def rows(self, contribution: Contribution, begin: int, end: int) -> tuple[Row, F32]:
        """(values, Fisher) of columns [begin, end); views where the tensors lie end to end already."""
        values = self._row(contribution.adapter, 0.0 if contribution.relative else self._start, begin, end)
        return values, self._row(contribution.fisher, NOT_HELD, begin, end)

    def update(self, values: Mapping[str, Tensor], relative: bool, begin: int, end: int) -> F64:
        """Columns [begin, end) of one patch's update, the caller's to overwrite; 0 of what it does not hold."""
        row = self._row(values, 0.0 if relative else self._start, begin, end)
        update: F64 = updates_of(row[None], self.parent[begin:end], np.array([relative]))[0]
        return update

    def _row(self, tensors: Mapping[str, Tensor], start: Row | float, begin: int, end: int) -> Any:
        if isinstance(tensors, Tensors) and tensors.flat is not None and tensors.places == self.places:
            return tensors.flat.numpy()[begin:end]
        row = np.full(end - begin, start, np.float32) if isinstance(start, float) else start[begin:end].copy()
        self._fill(row, tensors, begin)
        return row

    def _fill(self, row: Row, tensors: Mapping[str, Tensor], begin: int) -> None:
        """What `tensors` lack is left as it is."""
        target, end, stop = torch.from_numpy(row), begin + len(row), 0
        for name, shape in self.places:
            start, stop = stop, stop + prod(shape)
            if start >= end or stop <= begin or name not in tensors:
                continue
            low, high = max(start, begin), min(stop, end)
            target[low - begin : high - begin] = _part(tensors, name, shape, low - start, high - start)

    def split(self, row: F64) -> dict[str, Tensor]:
        parts = torch.split(torch.from_numpy(row), [prod(shape) for _, shape in self.places])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.places, parts, strict=True)}


def _part(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """[high - low] of one slot, laid out flat."""
    if (tensors.shape(name) if isinstance(tensors, Lazy) else tuple(tensors[name].shape)) != shape:
        raise Rejected("shape", f"A patch has slot {name} in another shape than its parent.")
    if isinstance(tensors, Lazy):
        return tensors.part(name, low, high)
    return tensors[name].detach().reshape(-1)[low:high]


@dataclass(frozen=True)
class Survey:
    """Of one pass over the patches: λ [P], whether they are relative [P], the norms of the updates [P], the strategy's
    own measure of them [P] or None, and all columns [P, C] when they fit."""

    weights: F64
    relative: NDArray[np.bool_]
    norms: F64
    measures: F64 | None
    block: tuple[Row, F32] | None


def survey(
    layout: Layout, contributions: Contributions, measure: Measure | None, block_elements: int, batch_elements: int
) -> Survey:
    """block_elements: the most that is kept of all patches; batch_elements: about how many are measured at a time.
    Raises Rejected("schema" | "shape" | "finite")."""
    ids: list[str] = []
    weights: list[float] = []
    relative: list[bool] = []
    sizes: list[F64] = []
    measures: list[F64] = []
    kept: list[tuple[Row, F32]] = []
    batch: list[tuple[Row, F32]] = []
    fits = True

    def settle() -> None:
        updates = _finite_updates(layout, batch, relative[-len(batch) :])
        sizes.append(norms(updates))
        if measure is not None:
            measures.append(measure(updates))
        kept.extend(batch if fits else ())
        batch.clear()

    for contribution in contributions():
        ids.append(contribution.patch)
        weights.append(contribution.weight)
        relative.append(contribution.relative)
        batch.append(layout.rows(contribution, 0, layout.size))
        fits = fits and len(ids) * layout.size <= block_elements
        if not fits:
            kept.clear()
        if len(batch) * layout.size >= batch_elements:
            settle()
    if batch:
        settle()
    if not ids or ids != sorted(set(ids)):
        raise Rejected("schema", "A merge takes patches sorted by id, each once, and at least one.")
    if not all(isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise Rejected("schema", "The weights of patches have to be finite, not negative, and not all zero.")
    block: tuple[Row, F32] | None = None
    if kept:
        block = np.stack([values for values, _ in kept]), np.stack([fisher for _, fisher in kept])  # type: ignore[assignment]
    return Survey(
        np.array(weights, np.float64),
        np.array(relative, bool),
        np.concatenate(sizes),
        np.concatenate(measures) if measures else None,
        block,
    )


def _finite_updates(layout: Layout, rows: list[tuple[Row, F32]], relative: list[bool]) -> F64:
    if not all(np.isfinite(part).all() for row in rows for part in row):
        raise Rejected("finite", "A patch holds values that are not finite.")
    values: Row = np.stack([values for values, _ in rows])  # type: ignore[assignment]
    return updates_of(values, layout.parent, np.array(relative, bool))


def gather(layout: Layout, contributions: Contributions, patches: int, begin: int, end: int) -> tuple[F64, F32]:
    """Columns [begin, end) of all patches, as copies, so that the rest of each patch can be let go."""
    values, fishers = np.empty((patches, end - begin), np.float64), np.empty((patches, end - begin), np.float32)
    for row, contribution in enumerate(contributions()):
        values[row], fishers[row] = layout.rows(contribution, begin, end)
    return values, fishers
