"""How long a stage waits, before it computes, for sessions that will be ready soon: those that compute together cost
little more than one of them. Two sessions that take turns would otherwise never meet.

Each session comes back a while after it was answered: the time that the rest of its chain takes. It is waited for if by
that measure it comes within a share of what a step costs. Times are seconds, on any clock.
"""

from collections.abc import Hashable

SHARE = 0.25
"""Of a step's time: the longest that those who are ready wait for those who are not."""
WEIGHT = 0.5
"""Of the latest measurement in what is expected."""


class Gathering:
    def __init__(self) -> None:
        self._gaps: dict[Hashable, float] = {}
        self._away: dict[Hashable, float] = {}
        self._step = 0.0
        self._deadline: float | None = None

    def answered(self, session: Hashable, now: float) -> None:
        """The session has its output; its next step will follow."""
        self._away[session] = now

    def arrived(self, session: Hashable, earliest: float, latest: float) -> None:
        """Its next step came between the two: nobody looks while a step is computed."""
        since = self._away.pop(session, None)
        if since is not None:
            low, high = max(0.0, earliest - since), latest - since
            gap = self._gaps.get(session, low)
            self._gaps[session] = gap + WEIGHT * (min(max(gap, low), high) - gap)

    def ended(self, session: Hashable) -> None:
        self._away.pop(session, None)
        self._gaps.pop(session, None)

    def computed(self, seconds: float) -> None:
        """A step of single tokens took so long."""
        self._step = self._step + WEIGHT * (seconds - self._step) if self._step else seconds

    def patience(self, now: float) -> float:
        """Some sessions are ready: for how long to wait for others; 0 when the time has come to compute."""
        share = SHARE * self._step
        if self._deadline is None:
            self._deadline = now + share
        expected = [  # soon, or just now; not what should have come long ago
            session
            for session, since in self._away.items()
            if session in self._gaps and -2 * share <= since + self._gaps[session] - self._deadline <= 0
        ]
        if expected and now < self._deadline:
            return self._deadline - now
        for session in expected:  # it did not keep its time; it is not counted on so soon again
            self._gaps[session] = 2 * max(self._gaps[session], now - self._away[session])
        self._deadline = None
        return 0.0
