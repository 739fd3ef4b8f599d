"""Virtual time: what is due happens in order, at once."""

from collections.abc import Callable
from heapq import heappop, heappush


class Clock:
    """`now` in seconds. What is due at the same time happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heappush(self._due, (self.now + seconds, self._asked, action))
        self._asked += 1

    def run(self, seconds: float) -> None:
        """All that happens in the next `seconds`."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, action = heappop(self._due)
            action()
        self.now = end
