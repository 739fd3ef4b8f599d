"""What a patch changes, as the merge and the evaluation see it, whatever form its blobs have.

A patch of few bytes may stand for tensors as large as the model. So these are made where somebody looks, and no more of
them than is looked at; the same bits on every machine, since they go into the merge: elementwise operations in float64
and in a fixed order, and no library's matrix products or sums.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, prod

import torch
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


class Sparse(Lazy):
    """`elsewhere`, but at `indices` (by slot, [k] int32, rising, into the flat tensor), where it is `values` ([k])."""

    def __init__(
        self, shapes: Mapping[str, Shape], indices: Mapping[str, Tensor], values: Mapping[str, Tensor], elsewhere: float
    ) -> None:
        super().__init__(shapes)
        self.indices, self._values, self._elsewhere = indices, values, elsewhere

    def part(self, name: str, low: int, high: int) -> Tensor:
        index = self.indices[name]
        begin, end = torch.searchsorted(index, torch.tensor([low, high], dtype=index.dtype)).tolist()
        flat = torch.full((high - low,), self._elsewhere)
        flat[index[begin:end].long() - low] = self._values[name][begin:end]
        return flat

    def alike(self, values: Mapping[str, Tensor], elsewhere: float) -> "Sparse":
        """With other values at the same indices."""
        return Sparse(self._shapes, self.indices, values, elsewhere)


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
        self._scaled = {name: _by_their_mean(means[name + ROWS]) for name, shape in shapes.items() if len(shape) > 1}
        for name, scaled in self._scaled.items():
            largest = scaled.amax(-1) * means[name + COLUMNS].double().amax(-1)
            if not bool(largest.to(torch.float32).isfinite().all()):
                raise Rejected("finite", f"The Fisher of slot {name[:128]!r} is too large to be merged.")

    def part(self, name: str, low: int, high: int) -> Tensor:
        if len(self._shapes[name]) < 2:
            return self._means[name][low:high]
        return super().part(name, low, high)

    def rows(self, name: str, low: int, high: int) -> Tensor:
        *stacked, count, columns = self._shapes[name]
        by_column = self._means[name + COLUMNS].double().reshape(prod(stacked), columns)
        own = self._scaled[name].reshape(-1)[low:high, None]
        if not stacked:
            return own * by_column
        return own * by_column[torch.arange(low, high) // count]


def _by_their_mean(rows: Tensor) -> Tensor:
    """[..., n] -> [..., n] float64: each by the mean of its matrix's."""
    by_row = rows.double().reshape(-1, rows.shape[-1])
    means = torch.tensor([fsum(matrix.tolist()) / len(matrix) for matrix in by_row], dtype=torch.float64)
    return (by_row / torch.where(means > 0, means, 1.0)[:, None]).reshape(rows.shape)


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


def taken_apart(flat: Tensor, places: Places) -> Tensors:
    """The reverse of `end_to_end`: views of `flat`."""
    parts = torch.split(flat, [prod(shape) for _, shape in places])
    tensors = Tensors((name, part.view(shape)) for (name, shape), part in zip(places, parts, strict=True))
    if flat.dtype == torch.float32:
        tensors.flat, tensors.places = flat, places
    return tensors
