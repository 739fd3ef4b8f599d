"""Merging patches, so that every peer gets the same bits.

    δ̄ = Σ λᵢ·F̃ᵢ·δᵢ / Σ λᵢ·F̃ᵢ        θ = parent + α·δ̄        (Matena & Raffel, 2022, arXiv:2111.09832)

All is float64 on the CPU, elementwise operations in a fixed order only (IEEE 754 rounds each of them exactly; sums go
by `_fold`, never by a library's reduction), patches in the order of their ids, and one cast at the end.

Nobody's Fisher is trusted: each coordinate is clipped at a multiple of the (lower) median over the patches, and the
norm of each update at a multiple of the median norm. With fewer than three patches the median means little. What a
patch does not hold counts as unchanged and without Fisher mass; where there is no mass the parent's value stays.

The slots are laid end to end, sorted by name, and worked through in blocks of columns for all patches at once, since
the median needs all of them; what a block takes is bounded, however many patches there are. A lineage of (IA)³ vectors
is one block, and is read once; the more there is, the more often `contributions` is called and its tensors are read.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from math import isfinite, prod
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import PatchId
from p2pmodel.tensors.blob import Tensors

GROUP = "p2pmodel.merge_strategies"
BLOCK_ELEMENTS = 16 << 20
"""Of what is held at a time of all patches (patches × columns), of values and of Fishers."""
_CACHED_ELEMENTS = 1 << 16
"""Of what is computed at a time, so that it stays in the processor's cache. It does not change the result."""

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
Row = F64 | F32


@dataclass(frozen=True)
class Contribution:
    """A patch as the merge sees it: `adapter` and `fisher` by slot name, `weight` the maintainers' λ ≥ 0."""

    patch: PatchId
    adapter: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    weight: float


Contributions = Callable[[], Iterable[Contribution]]
"""Sorted by patch id, and the same whenever it is called."""


class MergeStrategy(Protocol):
    @property
    def name(self) -> str: ...

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Contributions, parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The mean update δ̄ of every slot of the parent, float64, before α.

        Raises Rejected("schema" | "shape" | "finite") for parameters, orders or tensors that cannot be merged.
        """


class FisherMean:
    """`fisher@1`. Parameters: fisher_clip (2), norm_clip (3); both are multiples of a median."""

    name = "fisher@1"

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Contributions, parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        clips = _parameters(self.name, parameters, {"fisher_clip": 2.0, "norm_clip": 3.0})
        return _combine(parent, contributions, clips["norm_clip"], clips["fisher_clip"])


class PlainMean:
    """`mean@1`: Σ λᵢ·δᵢ / Σ λᵢ. No parameters."""

    name = "mean@1"

    def combine(
        self, parent: Mapping[str, Tensor], contributions: Contributions, parameters: Mapping[str, float]
    ) -> dict[str, Tensor]:
        _parameters(self.name, parameters, {})
        return _combine(parent, contributions, None, None)


_BUILT_IN: dict[str, MergeStrategy] = {strategy.name: strategy for strategy in (FisherMean(), PlainMean())}


def get_strategy(name: str) -> MergeStrategy:
    """A built-in one, or what an entry point of the group `p2pmodel.merge_strategies` names. Raises NotFound."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for entry in entry_points(group=GROUP, name=name):
        return cast(MergeStrategy, entry.load())
    raise NotFound(f"Merge strategy {name[:64]!r} is not known here.", "Install the package that provides it.")


def apply_update(parent: Mapping[str, Tensor], update: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """parent + α·update, in float64, cast once to the parent's dtype. Raises Rejected("finite")."""
    result = {}
    for name in sorted(parent):
        value = parent[name]
        if name in update:
            value = (value.to(torch.float64) + update[name].to(torch.float64) * alpha).to(value.dtype)
        if not bool(torch.isfinite(value).all()):
            raise Rejected("finite", f"The merge of slot {name} is not finite.")
        result[name] = value.clone()
    return result


def _combine(
    parent: Mapping[str, Tensor], contributions: Contributions, norm_clip: float | None, fisher_clip: float | None
) -> dict[str, Tensor]:
    layout = _Layout(parent)
    survey = _survey(layout, contributions)
    factors = survey.weights.copy()
    if norm_clip is not None:
        factors *= _norm_scales(survey.norms, norm_clip)
    patches = len(factors)
    columns = layout.size if survey.block else max(1, BLOCK_ELEMENTS // patches)
    result = np.empty(layout.size, np.float64)
    for begin in range(0, layout.size, columns):
        end = min(begin + columns, layout.size)
        values, fishers = survey.block or _gather(layout, contributions, patches, begin, end)
        step = max(16, _CACHED_ELEMENTS // patches)
        for low in range(begin, end, step):
            high = min(low + step, end)
            updates = values[:, low - begin : high - begin] - layout.parent[low:high]
            if fisher_clip is None:
                updates *= factors[:, None]
                result[low:high] = _fold(updates) / _fold(survey.weights.copy())
            else:
                mass = _clipped(fishers[:, low - begin : high - begin], fisher_clip)
                result[low:high] = _weighted_mean(updates, mass, survey.weights, factors)
    if not np.isfinite(result).all():
        raise Rejected("finite", "The patches' values are too large to be merged.")
    return layout.split(result)


def _weighted_mean(updates: F64, mass: F64, weights: F64, factors: F64) -> F64:
    """updates, mass: [P, C], overwritten; factors: [P], the weights times what the norms are clipped by. -> [C]"""
    updates *= mass
    updates *= factors[:, None]
    mass *= weights[:, None]
    total, weighted = _fold(mass), _fold(updates)
    return np.divide(weighted, total, out=np.zeros_like(total), where=total > 0)


def _clipped(fishers: F32, clip: float) -> F64:
    """[P, C], not negative, at most `clip` times the lower median of their column."""
    positive: F32 = np.maximum(fishers, 0)
    middle = (len(fishers) - 1) // 2
    median = np.partition(positive.T.copy(), middle, axis=-1)[:, middle]
    clipped: F64 = np.minimum(positive, median.astype(np.float64) * clip)
    return clipped


def _norm_scales(norms: F64, clip: float) -> F64:
    """Of each patch: what brings its norm down to clip × the lower median norm; 1 where it is below."""
    limit = np.sort(norms)[(len(norms) - 1) // 2] * clip
    scales: F64 = np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
    return scales


def _fold(rows: F64) -> F64:
    """Sum over the first axis, overwriting it: the second half is added to the first until one row is left, so that
    the order of additions depends on the number of rows alone."""
    n = len(rows)
    while n > 1:
        half = (n + 1) // 2
        rows[: n - half] += rows[half:n]
        n = half
    total: F64 = rows[0]
    return total


class _Layout:
    """The slots of the parent, end to end in the order of their names."""

    def __init__(self, parent: Mapping[str, Tensor]) -> None:
        self.places = tuple((name, tuple(parent[name].shape)) for name in sorted(parent))
        self.size = sum(prod(shape) for _, shape in self.places)
        if not self.size:
            raise Rejected("schema", "The parent version has no slots.")
        self._wide = any(tensor.dtype == torch.float64 for tensor in parent.values())
        self.parent: F64 = np.empty(self.size, np.float64)
        self._fill(self.parent, parent, 0)
        self._start: Row = self.parent if self._wide else self.parent.astype(np.float32)

    def rows(self, contribution: Contribution, begin: int, end: int) -> tuple[Row, F32]:
        """(values, Fisher) of columns [begin, end); views where the tensors lie end to end already."""
        values = self._row(contribution.adapter, self._start, begin, end)
        return values, self._row(contribution.fisher, None, begin, end)

    def _row(self, tensors: Mapping[str, Tensor], start: Row | None, begin: int, end: int) -> Any:
        if isinstance(tensors, Tensors) and tensors.flat is not None and tensors.places == self.places:
            return tensors.flat.numpy()[begin:end]
        row = np.zeros(end - begin, np.float32) if start is None else start[begin:end].copy()
        self._fill(row, tensors, begin)
        return row

    def _fill(self, row: Row, tensors: Mapping[str, Tensor], begin: int) -> None:
        """What `tensors` lack is left as it is."""
        target, end, stop = torch.from_numpy(row), begin + len(row), 0
        for name, shape in self.places:
            start, stop = stop, stop + prod(shape)
            if start >= end or stop <= begin or name not in tensors:
                continue
            if tensors[name].shape != shape:
                raise Rejected("shape", f"A patch has slot {name} in another shape than its parent.")
            low, high = max(start, begin), min(stop, end)
            target[low - begin : high - begin] = tensors[name].detach().reshape(-1)[low - start : high - start]

    def split(self, row: F64) -> dict[str, Tensor]:
        parts = torch.split(torch.from_numpy(row), [prod(shape) for _, shape in self.places])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.places, parts, strict=True)}


@dataclass(frozen=True)
class _Survey:
    """Of one pass over the patches: λ [P], the norms of the updates [P], and all columns [P, C] when they fit."""

    weights: F64
    norms: F64
    block: tuple[Row, F32] | None


def _survey(layout: _Layout, contributions: Contributions) -> _Survey:
    ids: list[str] = []
    weights: list[float] = []
    norms: list[F64] = []
    kept: list[tuple[Row, F32]] = []
    batch: list[tuple[Row, F32]] = []
    fits = True
    for contribution in contributions():
        ids.append(contribution.patch)
        weights.append(contribution.weight)
        batch.append(layout.rows(contribution, 0, layout.size))
        fits = fits and len(ids) * layout.size <= BLOCK_ELEMENTS
        if not fits:
            kept.clear()
        if len(batch) * layout.size >= _CACHED_ELEMENTS:
            norms.append(_norms(layout, batch))
            kept += batch if fits else []
            batch = []
    if batch:
        norms.append(_norms(layout, batch))
        kept += batch if fits else []
    if not ids or ids != sorted(set(ids)):
        raise Rejected("schema", "A merge takes patches sorted by id, each once, and at least one.")
    if not all(isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise Rejected("schema", "The weights of patches have to be finite, not negative, and not all zero.")
    block: tuple[Row, F32] | None = None
    if kept:
        block = np.stack([values for values, _ in kept]), np.stack([fisher for _, fisher in kept])  # type: ignore[assignment]
    return _Survey(np.array(weights, np.float64), np.concatenate(norms), block)


def _norms(layout: _Layout, rows: list[tuple[Row, F32]]) -> F64:
    """Euclidean, of the updates of some patches. Raises Rejected("finite")."""
    if not all(np.isfinite(part).all() for row in rows for part in row):
        raise Rejected("finite", "A patch holds values that are not finite.")
    updates = np.stack([values for values, _ in rows]).astype(np.float64)
    updates -= layout.parent
    norms: F64 = np.sqrt(_fold(np.square(updates.T)))
    return norms


def _gather(layout: _Layout, contributions: Contributions, patches: int, begin: int, end: int) -> tuple[F64, F32]:
    """Columns [begin, end) of all patches, as copies, so that the rest of each patch can be let go."""
    values, fishers = np.empty((patches, end - begin), np.float64), np.empty((patches, end - begin), np.float32)
    for row, contribution in enumerate(contributions()):
        values[row], fishers[row] = layout.rows(contribution, begin, end)
    return values, fishers


def _parameters(strategy: str, given: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    for name, value in given.items():
        if name not in known or not (isfinite(value) and value > 0):
            raise Rejected("schema", f"Merge strategy {strategy} takes no parameter {name[:64]!r} of {value}.")
    return {**known, **given}
