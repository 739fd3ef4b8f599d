"""What a merge has to know of whole patches before it looks at columns of all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors.merging.contributions import Contribution
from p2pmodel.tensors.merging.layout import F64, Layout, fold, folded

Measure = Callable[[F64], float]
"""Of an update [N]."""

STRETCH, LANES = 1 << 16, 1 << 10
"""Columns whose squares are looked at at a time, and how many sums are kept of them until the end: a part of how a norm
is rounded."""


@dataclass(frozen=True)
class Survey:
    """weights [P]: λ; norms [P]: of the updates; measures [P]: the strategy's own, or None."""

    weights: F64
    norms: F64
    measures: F64 | None


def survey(layout: Layout, contributions: Sequence[Contribution], measure: Measure | None) -> Survey:
    """Raises Rejected("schema" | "shape" | "finite")."""
    weights = [contribution.weight for contribution in contributions]
    ids = [contribution.patch for contribution in contributions]
    if not ids or ids != sorted(set(ids)):
        raise Rejected("schema", "A merge takes patches sorted by id, each once, and at least one.")
    if not all(isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise Rejected("schema", "The weights of patches have to be finite, not negative, and not all zero.")
    count = max(1, STRETCH // layout.size)
    batches = [contributions[first : first + count] for first in range(0, len(contributions), count)]
    squares = np.concatenate([_squares(layout, batch) for batch in batches])
    if not np.isfinite(squares).all():
        raise Rejected("finite", "A patch holds values that are not finite.")
    measures = None
    if measure is not None:
        found = [measure(layout.update(c.adapter, c.relative, 0, layout.size)) for c in contributions]
        measures = np.array(found, np.float64)
    return Survey(np.array(weights, np.float64), np.sqrt(squares), measures)


def _squares(layout: Layout, batch: Sequence[Contribution]) -> F64:
    """[B]: the sum of each update's squares."""
    lanes: F64 = np.zeros((LANES, len(batch)), np.float64)
    updates: F64 = np.empty((len(batch), min(layout.size, STRETCH)), np.float64)
    for begin in range(0, layout.size, STRETCH):
        end = min(begin + STRETCH, layout.size)
        some = updates[:, : end - begin]
        for row, contribution in zip(some, batch, strict=True):
            layout.update(contribution.adapter, contribution.relative, begin, end, out=row)
        np.square(some, out=some)
        sums = folded(some.T, LANES)
        lanes[: len(sums)] += sums
    return fold(lanes)
