"""The expert hosts that a trunk is connected to, and the calls that are under way to them."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from p2pmodel.domain.experts import ExpertCall, ExpertLease
from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.engine.expert_calls import Pairs
from p2pmodel.logic.experts import MEMORY
from p2pmodel.swarm.expert_link import ExpertLink, Switch
from p2pmodel.swarm.framing import SCRATCH_BYTES
from p2pmodel.tensors.codecs import get_codec

MOST_SECONDS = 60.0
"""For any answer, whatever its peer says of its speed: the thread that computes waits for it."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Doubt:
    """An answer that is not finite, for whose rows others are asked as well. by: who gave it; open: calls that are to
    show whether it was right; shared: whether it may have been, since another peer's was not finite, or did not come.
    """

    by: "Helper"
    open: int = 0
    shared: bool = False


@dataclass(eq=False)
class Call:
    """Rows under way to one peer. own [R]: which of the forward's rows they are; pairs: into `own`; gates: at which of
    the forward's gates, flat, each pair is; expected: seconds, once those before it are answered; doubt: of what the
    answer is to show; dropped: nobody waits for the answer any more."""

    what: ExpertCall
    own: Tensor
    pairs: Pairs
    gates: Tensor
    sent: float = 0.0
    expected: float = 0.0
    doubt: Doubt | None = None
    dropped: bool = False
    rows: Tensor | None = None
    of_gates: Tensor | None = None

    @property
    def order(self) -> tuple[int, int]:
        return int(self.pairs.expert.min()), int(self.own[0])


@dataclass(eq=False)
class Helper:
    """A connected expert host. latency: seconds beyond what its pairs take, as lately seen; calls: under way, in
    order; heard: when it last answered."""

    link: ExpertLink
    lease: ExpertLease
    latency: float
    calls: deque[Call] = field(default_factory=deque)
    heard: float = 0.0

    def __post_init__(self) -> None:
        self.experts = frozenset(self.lease.experts)

    @property
    def pair_seconds(self) -> float:
        return min(MOST_SECONDS, self.lease.pair_seconds * (1 + self.lease.queue))

    def serves(self, layer: int, version: VersionId) -> bool:
        return self.link.failed is None and layer in self.lease.span and version in self.lease.versions

    def drain(self, scratch: memoryview) -> None:
        """Between forwards: reads what earlier ones have left behind. Its link may have failed afterwards."""
        if self.calls:
            self.link.drain(scratch)
            for _ in self.link.take():
                self.calls.popleft()

    def took(self, seconds: float, pairs: int) -> None:
        beyond = max(0.0, seconds - pairs * self.lease.pair_seconds)
        self.latency += MEMORY * (beyond - self.latency)


@dataclass(frozen=True)
class DispatchStats:
    """Totals since the start. calls: sent, with so many rows and pairs of a row and an expert; retries: calls that
    somebody else had to take over; spread: gates whose experts nobody hosted; seconds: that forwards waited."""

    calls: int
    rows: int
    pairs: int
    retries: int
    spread: int
    seconds: float
    bytes_out: int
    bytes_in: int


class Helpers:
    """Those that can be asked, and those whose links have yet to be closed. One thread at a time computes; links come
    and go from any."""

    def __init__(self, model: ModelId, codec: str, *, spread: bool, failed: Callable[[PeerId], None]) -> None:
        """spread: whether the gates of experts that nobody hosts go to the others; failed: told of peers that did, in
        the thread that computes. Raises InvalidInput for an unknown codec."""
        self.model, self.codec, self.spread = model, get_codec(codec), spread
        self._failed = failed
        self._helpers: dict[PeerId, Helper] = {}
        self._retired: list[Helper] = []
        self._lock = threading.Lock()
        self._forwards = 0
        self._closed = False
        self._switch = Switch()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._counts = dict.fromkeys(("calls", "rows", "pairs", "retries", "spread"), 0)
        self._seconds = 0.0
        self._gone_bytes = [0, 0]

    @property
    def helpers(self) -> dict[PeerId, Helper]:
        """Those that can be asked."""
        with self._lock:
            return {peer: helper for peer, helper in self._helpers.items() if helper.link.failed is None}

    @property
    def stats(self) -> DispatchStats:
        with self._lock:
            links = [helper.link.traffic for helper in (*self._helpers.values(), *self._retired)]
            sent, received = (self._gone_bytes[i] + sum(traffic[i] for traffic in links) for i in (0, 1))
        return DispatchStats(**self._counts, seconds=self._seconds, bytes_out=sent, bytes_in=received)

    def add(self, link: ExpertLink, lease: ExpertLease) -> None:
        """The link is closed here. It takes the place of an earlier one to the same peer."""
        with self._lock:
            before = self._helpers.pop(link.peer, None)
            if before is not None:
                self._retired.append(before)
            helper = Helper(link, lease, 2 * link.delay if before is None else before.latency)
            if self._closed:
                self._retired.append(helper)
            else:
                self._helpers[link.peer] = helper
        self._sweep()

    def check(self) -> list[ExpertLink]:
        """The links that have ended while nothing was sent; they are asked nothing new."""
        with self._lock:
            helpers = list(self._helpers.values())
            if not self._forwards:
                for helper in helpers:
                    helper.drain(self._scratch)
        ended = [helper for helper in helpers if helper.link.failed is not None or helper.link.is_over()]
        for helper in ended:
            self._retire(helper)
        self._sweep()
        return [helper.link for helper in ended]

    def renew(self, lease: ExpertLease) -> None:
        """What a peer says of itself now."""
        with self._lock:
            helper = self._helpers.get(lease.peer)
            if helper is not None:
                helper.lease, helper.experts = lease, frozenset(lease.experts)

    def remove(self, peer: PeerId) -> None:
        """It is asked nothing new."""
        with self._lock:
            helper = self._helpers.get(peer)
        if helper is not None:
            self._retire(helper)
        self._sweep()

    def close(self) -> None:
        """When nothing is sent any more; what is added later is closed too."""
        with self._lock:
            self._closed = True
            self._retired += self._helpers.values()
            self._helpers.clear()
        self._sweep()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Links stay open meanwhile, though they be replaced."""
        with self._lock:
            self._forwards += 1
        try:
            yield
        finally:
            with self._lock:
                self._forwards -= 1
            self._sweep()

    def wait(self, helpers: Sequence[Helper], seconds: float) -> None:
        self._switch.wait([helper.link for helper in helpers], seconds)

    def lost(self, helper: Helper) -> None:
        """Its link has failed."""
        assert helper.link.failed is not None
        log.warning("%s", helper.link.failed.message)
        if self._retire(helper):
            self._failed(helper.link.peer)

    def count(self, **more: int) -> None:
        for name, number in more.items():
            self._counts[name] += number

    def waited(self, seconds: float) -> None:
        self._seconds += seconds

    def _retire(self, helper: Helper) -> bool:
        """Whether it was the one in use for its peer."""
        with self._lock:
            current = self._helpers.get(helper.link.peer) is helper
            if current:
                self._retired.append(self._helpers.pop(helper.link.peer))
            return current

    def _sweep(self) -> None:
        with self._lock:
            if self._forwards:
                return
            retired, self._retired = self._retired, []
            for helper in retired:
                for i in (0, 1):
                    self._gone_bytes[i] += helper.link.traffic[i]
                if helper.link.failed is None:
                    helper.link.close()
