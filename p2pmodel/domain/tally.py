"""How a figure is spread, as histograms show it: a count for each range of values, and the sum of all of them."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise


class Tally:
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is of those beyond. One
    thread adds; what others read may lack the value that is being added."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError("a tally's bounds have to ascend")
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)
