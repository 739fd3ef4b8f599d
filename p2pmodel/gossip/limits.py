"""Token buckets: how often somebody may do something. Time is an argument, in seconds of any monotonic clock."""

from collections import OrderedDict
from collections.abc import Hashable

PUBLISH_RATE = 5.0
"""Messages a second that one peer may publish on one topic: above it py-libp2p's delivery falls off."""

PUBLISH_BURST = 20


class TokenBucket:
    """`burst` at once, then `rate` a second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Whether there was a token to take."""
        self._fill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def reserve(self, now: float) -> float:
        """Takes a token in any case; the seconds to wait before acting on it. Those who reserve first act first."""
        self._fill(now)
        self._tokens -= 1
        return max(0.0, -self._tokens / self._rate)

    def _fill(self, now: float) -> None:
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now


class SourceLimits:
    """One bucket for each source, for the `capacity` sources seen last."""

    def __init__(self, rate: float, burst: float, capacity: int) -> None:
        self._rate = rate
        self._burst = burst
        self._capacity = capacity
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def allow(self, source: Hashable, now: float) -> bool:
        bucket = self._buckets.get(source)
        if bucket is None:
            bucket = self._buckets[source] = TokenBucket(self._rate, self._burst)
            if len(self._buckets) > self._capacity:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(source)
        return bucket.take(now)
