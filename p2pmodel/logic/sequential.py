"""Deciding on a part of an exam: a test of paired differences that may be looked at after every case.

The cases of a suite are few and fixed, and are drawn in an order that nobody chose. Of the mean over all of them, two
hypotheses are tested, that it is not below a boundary and that it is not above. Against each somebody bets: with what
is left to draw, a fair bet under the hypothesis cannot gain on average, so the chance that the stake ever grows to 1/ε
is at most ε, however often one looks (Ville's inequality; Waudby-Smith and Ramdas, "Confidence sequences for sampling
without replacement", 2020). Nothing is assumed of the differences but that each is clipped into `boundary ± reach`.
"""

from enum import Enum

STAKES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 7 / 8)
"""Shares of the stake that are bet side by side, in equal parts: small ones for noise, large ones for clear cases."""

ROUNDING = 1e-9


class Side(Enum):
    BELOW = "below"
    ABOVE = "above"
    OPEN = "open"


class SequentialTest:
    """Whether the mean over all `total` cases lies below or above `boundary`.

    BELOW is wrong with probability at most `error`, and so is ABOVE, for the mean of the clipped differences.
    """

    def __init__(self, total: int, boundary: float, reach: float, error: float) -> None:
        if not reach > 0 or not 0 < error < 1:
            raise ValueError("a sequential test needs a reach and an error rate in (0, 1)")
        self._boundary, self._reach = boundary, reach
        self._below, self._above = _Refutation(total, error), _Refutation(total, error)
        self.side = Side.OPEN

    def add(self, difference: float) -> Side:
        """The next one drawn. What was decided once stands. Raises ValueError for more than there are."""
        value = min(1.0, max(-1.0, (difference - self._boundary) / self._reach))
        below, above = self._below.add(value), self._above.add(-value)
        if self.side is Side.OPEN and (below or above):
            self.side = Side.BELOW if below else Side.ABOVE
        return self.side


class _Refutation:
    """Of the hypothesis that the mean of all values, each in [-1, 1], is at least 0."""

    def __init__(self, total: int, error: float) -> None:
        self._left, self._enough = total, len(STAKES) / error
        self._capital = [1.0] * len(STAKES)
        self._drawn = 0.0

    def add(self, value: float) -> bool:
        if not self._left:
            raise ValueError("a sequential test has seen all of its cases")
        least = -self._drawn / self._left  # the mean of what is left, if the hypothesis just holds
        if -1 < least < 1 - ROUNDING:
            gain = (least - value) / (1 - least)
            self._capital = [stake * (1 + share * gain) for stake, share in zip(self._capital, STAKES, strict=True)]
        self._drawn += value
        self._left -= 1
        return sum(self._capital) >= self._enough or self._drawn + self._left < -ROUNDING
