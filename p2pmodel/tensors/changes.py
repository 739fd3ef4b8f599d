"""What a patch changes, as the merge and the evaluation see it, whatever form its blobs have.

A patch of few bytes may stand for tensors as large as the model. So these are made where somebody looks, and no more of
them than is looked at; the same bits on every machine, since they go into the merge: elementwise operations in float64
and in a fixed order, and no library's matrix products or sums.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import fsum, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors.blob import Tensors

_CACHED_ELEMENTS = 1 << 15
"""Of what is computed at a time, so that it stays in the processor's cache. It does not change the result."""

NOT_HELD = -1.0
"""In place of a Fisher: the patch says nothing of this value. Zero is what has no mass."""

Shape = tuple[int, ...]
Places = tuple[tuple[str, Shape], ...]
"""(name, shape) of tensors that lie end to end, sorted by name."""


@dataclass(frozen=True)
class Change:
    """values: by slot, float32; relative: they are added to the parent's, and else take their place. fisher_places: of
    what the Fisher blob is."""

    values: Mapping[str, Tensor]
    relative: bool
    fisher_places: Places

    def shape(self, slot: str) -> Shape:
        return self.values.shape(slot) if isinstance(self.values, Lazy) else tuple(self.values[slot].shape)

    def applied_to(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state with this patch alone, as it would be merged at α = 1 without any clipping."""
        changed = dict(state)
        for name in self.values:
            changed[name] = state[name] + self.values[name] if self.relative else self.values[name]
        return changed


class Lazy(Mapping[str, Tensor]):
    """Tensors by slot name that are made where they are looked at."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = dict(sorted(shapes.items()))

    @abstractmethod
    def part(self, name: str, low: int, high: int) -> Tensor:
        """[high - low]: of the tensor laid out flat."""

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self.part(name, 0, prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class EndToEnd(Lazy):
    """Tensors that lie one after the other in the order of their names."""

    def __init__(self, places: Places) -> None:
        self.places, self._shapes, self._starts, self.size = _frame(places)

    @abstractmethod
    def across(self, low: int, high: int) -> Tensor:
        """[high - low] float32, on the CPU: of all of them as one vector."""

    def part(self, name: str, low: int, high: int) -> Tensor:
        start = self._starts[name]
        return self.across(start + low, start + high)


@lru_cache(maxsize=64)
def _frame(places: Places) -> tuple[Places, dict[str, Shape], dict[str, int], int]:
    """(places, shapes, where each begins, values of all): the same objects for the patches of a lineage, of which many
    are held at a time."""
    *starts, size = accumulate((prod(shape) for _, shape in places), initial=0)
    return places, dict(places), {name: start for (name, _), start in zip(places, starts, strict=True)}, size


def blocks_of(codes: NDArray[np.uint8], low: int, high: int) -> NDArray[np.uint8]:
    """[high - low]: with zeros after the last of them."""
    found = codes[low:high]
    if len(found) < high - low:
        found = np.concatenate([found, np.zeros(high - low - len(found), np.uint8)])
    return found


class Flat(EndToEnd):
    """Views of one vector."""

    def __init__(self, flat: Tensor, places: Places) -> None:
        """flat: [N] float32."""
        super().__init__(places)
        self._flat = flat

    def across(self, low: int, high: int) -> Tensor:
        return self._flat[low:high]


class Sparse(Lazy):
    """`elsewhere`, but at `indices` (by slot, [k] int32, rising, into the flat tensor), where it is `values` ([k], by
    slot and suffix)."""

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        indices: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        suffix: str,
        elsewhere: float,
    ) -> None:
        super().__init__(shapes)
        self.indices, self._values, self._suffix, self._elsewhere = indices, values, suffix, elsewhere

    def part(self, name: str, low: int, high: int) -> Tensor:
        index = self.indices[name]
        begin, end = torch.searchsorted(index, torch.tensor([low, high], dtype=index.dtype)).tolist()
        flat = torch.full((high - low,), self._elsewhere)
        if begin < end:
            flat[index[begin:end].long() - low] = part_of(self._values, name + self._suffix, begin, end)
        return flat

    def alike(self, values: Mapping[str, Tensor], elsewhere: float) -> "Sparse":
        """With other values at the same indices."""
        return Sparse(self._shapes, self.indices, values, self._suffix, elsewhere)


def part_of(tensors: Mapping[str, Tensor], name: str, low: int, high: int) -> Tensor:
    """[high - low]: of the tensor laid out flat."""
    return tensors.part(name, low, high) if isinstance(tensors, Lazy) else tensors[name].reshape(-1)[low:high]


class _ByRows(Lazy):
    """Of matrices, or stacks of them: whatever is looked at, whole rows are made."""

    @abstractmethod
    def rows(self, name: str, low: int, high: int) -> Tensor:
        """[high - low, columns] float64: of the rows of all its matrices, one under the other."""

    def part(self, name: str, low: int, high: int) -> Tensor:
        columns = self._shapes[name][-1]
        first, last = low // columns, -(-high // columns)
        flat = self.rows(name, first, last).reshape(-1)
        return flat[low - first * columns : high - first * columns].to(torch.float32)


class Product(_ByRows):
    """scale · B·A of matrices: left [n, r] and right [r, m] by slot."""

    def __init__(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor], scale: float) -> None:
        super().__init__({name: (left[name].shape[0], right[name].shape[1]) for name in left})
        self.left, self.right, self.scale = left, right, scale

    @property
    def rank(self) -> int:
        """The largest of them."""
        return max(len(factor) for factor in self.right.values())

    def rows(self, name: str, low: int, high: int) -> Tensor:
        left, right = self.left[name][low:high].double(), self.right[name].double()
        total = torch.zeros(high - low, right.shape[1], dtype=torch.float64)
        few = max(1, _CACHED_ELEMENTS // right.shape[1])
        for factors, sums in zip(left.split(few), total.split(few), strict=True):  # type: ignore[no-untyped-call]
            for rank in range(right.shape[0]):
                sums += factors[:, rank, None] * right[rank]
            sums *= self.scale
        return total


ROWS, COLUMNS = "#rows", "#columns"


class Factored(_ByRows):
    """A Fisher of which the means of rows and columns are known: rᵢ·cⱼ / mean(r), as Adafactor keeps its second moments
    (Shazeer & Stern, 2018). Vectors are there as they are."""

    def __init__(self, shapes: Mapping[str, Shape], means: Mapping[str, Tensor]) -> None:
        """means: {slot#rows: [..., n], slot#columns: [..., m]}, or {slot: [n]} for vectors, finite and not negative.
        Raises Rejected("finite") where a product of them is beyond what a float32 holds."""
        super().__init__(shapes)
        self._means = means
        self._by_matrix = {name: _mean_rows(means[name + ROWS]) for name, shape in shapes.items() if len(shape) > 1}
        for name, by_matrix in self._by_matrix.items():
            rows = self._scaled(name, 0, prod(shapes[name][:-1])).view(len(by_matrix), -1)
            largest = rows.amax(-1) * means[name + COLUMNS].double().reshape(len(by_matrix), -1).amax(-1)
            if not bool(largest.to(torch.float32).isfinite().all()):
                raise Rejected("finite", f"The Fisher of slot {name[:128]!r} is too large to be merged.")

    def part(self, name: str, low: int, high: int) -> Tensor:
        if len(self._shapes[name]) < 2:
            return part_of(self._means, name, low, high)
        return super().part(name, low, high)

    def rows(self, name: str, low: int, high: int) -> Tensor:
        *_, count, columns = self._shapes[name]
        first, last = low // count, -(-high // count)
        by_column = part_of(self._means, name + COLUMNS, first * columns, last * columns).double().view(-1, columns)
        own = self._scaled(name, low, high)[:, None]
        return own * (by_column if len(by_column) == 1 else by_column[torch.arange(low, high) // count - first])

    def _scaled(self, name: str, low: int, high: int) -> Tensor:
        """[high - low] float64: the means of these rows of all matrices, each by the mean of its matrix's."""
        own = part_of(self._means, name + ROWS, low, high).double()
        return own / self._by_matrix[name][torch.arange(low, high) // self._shapes[name][-2]]


def _mean_rows(rows: Tensor) -> Tensor:
    """[..., n] -> [matrices] float64: the mean of each; 1 where it is 0."""
    by_matrix = rows.double().reshape(-1, rows.shape[-1])
    means = torch.tensor([fsum(matrix.tolist()) / len(matrix) for matrix in by_matrix], dtype=torch.float64)
    return torch.where(means > 0, means, 1.0)


def slot_places(slots: Sequence[Slot]) -> Places:
    return tuple((slot.name, slot.shape) for slot in sorted(slots, key=lambda slot: slot.name))


def factored_places(name: str, shape: Shape) -> Places:
    """What is kept of the Fisher of a slot."""
    if len(shape) < 2:
        return ((name, shape),)
    return (name + COLUMNS, (*shape[:-2], shape[-1])), (name + ROWS, shape[:-1])


def factors(name: str, squares: Tensor) -> dict[str, Tensor]:
    """Of a slot's Fisher [..., n, m], or of squared gradients, what `Factored` takes."""
    if squares.ndim < 2:
        return {name: squares}
    return {name + COLUMNS: squares.mean(-2), name + ROWS: squares.mean(-1)}


def end_to_end(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Places]:
    """(one flat vector float32 on the CPU, where each lies in it)."""
    places = tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors))
    parts = [tensors[name].detach().reshape(-1).to("cpu", torch.float32) for name, _ in places]
    return torch.cat(parts) if parts else torch.empty(0), places


def laid_out(tensors: Tensors) -> Mapping[str, Tensor]:
    """The same, end to end where the blob was."""
    return tensors if tensors.flat is None else Flat(tensors.flat, tensors.places)
