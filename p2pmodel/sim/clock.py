"""Virtual time: what is due happens in order, at once."""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any


class Clock:
    """`now` in seconds. What is due at the same time happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        heappush(self._due, (self.now + seconds, self._asked, action, arguments))
        self._asked += 1

    def in_turn(self, times: Sequence[float], items: Sequence[Any], action: Callable[[Any], None]) -> None:
        """`action(item)` at the time of each; `times` ascend. Only the next of them takes room among what is due."""
        if times:
            self._take_turn(0, times, items, action, begin=True)

    def run(self, seconds: float) -> None:
        """All that happens in the next `seconds`."""
        end, due = self.now + seconds, self._due
        while due and due[0][0] <= end:
            self.now, _, action, arguments = heappop(due)
            action(*arguments)
            self.happened += 1
        self.now = end

    def _take_turn(
        self, at: int, times: Sequence[float], items: Sequence[Any], action: Callable[[Any], None], begin: bool = False
    ) -> None:
        if not begin:
            action(items[at])
            at += 1
        if at < len(times):
            heappush(self._due, (times[at], self._asked, self._take_turn, (at, times, items, action)))
            self._asked += 1
