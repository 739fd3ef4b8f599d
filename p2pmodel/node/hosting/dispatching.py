"""Brings a trunk's rows to the peers that host their experts, and tries another one where one fails.

A forward's pairs of a row and an expert are shared out among the peers, a call for each; every call that is lost is
shared out again among those that are left. What comes back is added up in the order of the experts, whoever answered
first, so the sum does not depend on the network.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import ModelId, PeerId
from p2pmodel.engine.remote_experts import Traffic
from p2pmodel.node.hosting.forwarding import Forward, Helper
from p2pmodel.swarm.expert_link import ExpertLink, Switch
from p2pmodel.swarm.framing import SCRATCH_BYTES
from p2pmodel.tensors.codecs import get_codec

log = logging.getLogger(__name__)


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


class Dispatcher:
    """Implements `engine.remote_experts.Exchange` over the links that it is given. One thread at a time computes; links
    come and go from any."""

    def __init__(self, model: ModelId, codec: str, *, spread: bool, failed: Callable[[PeerId], None]) -> None:
        """spread: whether the gates of experts that nobody hosts go to the others; failed: told of peers that did, in
        the thread that computes. Raises InvalidInput for an unknown codec."""
        self.codec = get_codec(codec)
        self.spread = spread
        self._model, self._failed = model, failed
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
        """The link is the dispatcher's from now on. It takes the place of an earlier one to the same peer."""
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

    def sums(
        self,
        layer: int,
        rows: Tensor,
        experts: Tensor,
        gates: Tensor,
        traffic: Traffic,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """See `Exchange`. Raises Rejected("overflow"), Unreachable naming the layer and the expert."""
        with self._under_way(Forward(self, layer, rows, experts, gates, traffic)) as forward:
            forward.start()
            meanwhile()
            return forward.sum()

    def gradients(
        self, layer: int, rows: Tensor, experts: Tensor, gates: Tensor, outer: Tensor, traffic: Traffic
    ) -> tuple[Tensor, Tensor]:
        """See `Exchange`. Raises as `sums` does."""
        with self._under_way(Forward(self, layer, rows, experts, gates, traffic, outer)) as forward:
            forward.start()
            return forward.gradients()

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

    @property
    def model(self) -> ModelId:
        return self._model

    @contextmanager
    def _under_way(self, forward: Forward) -> Iterator[Forward]:
        """Links stay open meanwhile, though they be replaced. Answers that a forward which breaks off has left behind
        are nobody's."""
        with self._lock:
            self._forwards += 1
        try:
            yield forward
        finally:
            forward.drop()
            with self._lock:
                self._forwards -= 1
            self._sweep()

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
