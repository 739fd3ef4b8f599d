"""Brings a trunk's rows to the peers that host their experts, and tries another one where one fails.

A forward's pairs of a row and an expert are shared out among the peers, a call for each; every call that is lost is
shared out again among those that are left. What comes back is added up in the order of the experts, whoever answered
first, so the sum does not depend on the network.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2pmodel.domain.errors import PeerFailed, Rejected, Unreachable
from p2pmodel.domain.experts import MAX_CALL_ROWS, ExpertCall, ExpertLease, MissingExpert
from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.engine.expert_calls import Pairs, decode_answer, encode_call, is_finite
from p2pmodel.engine.remote_experts import Traffic
from p2pmodel.logic.experts import MEMORY, Offer, assign, name_missing
from p2pmodel.swarm.expert_link import ExpertLink, Switch
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 10.0
"""For an answer of a peer that nobody can stand in for."""
PATIENCE_SECONDS = 0.5
"""For one that somebody can, or longer where that is what it usually takes."""
PATIENT = 10.0
"""How many times the expected seconds an answer may take then."""


@dataclass(eq=False)
class Call:
    """Rows under way to one peer. own [R]: which of the forward's rows they are; pairs: into `own`; gates: at which of
    the forward's gates, flat, each pair is; dropped: nobody waits for the answer any more."""

    what: ExpertCall
    own: Tensor
    pairs: Pairs
    gates: Tensor
    sent: float = 0.0
    expected: float = 0.0
    dropped: bool = False
    rows: Tensor | None = None
    of_gates: Tensor | None = None

    @property
    def order(self) -> tuple[int, int]:
        return int(self.pairs.expert.min()), int(self.own[0])


@dataclass(eq=False)
class Helper:
    """A connected expert host. latency: seconds beyond what its pairs take, as lately seen; calls: under way, in
    order."""

    link: ExpertLink
    lease: ExpertLease
    latency: float
    calls: deque[Call] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.experts = frozenset(self.lease.experts)

    @property
    def pair_seconds(self) -> float:
        return self.lease.pair_seconds * (1 + self.lease.queue)

    def serves(self, layer: int, version: VersionId) -> bool:
        return self.link.failed is None and layer in self.lease.span and version in self.lease.versions

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


class Dispatcher:
    """Implements `engine.remote_experts.Exchange` over the links that it is given. One thread at a time sends; links
    come and go from any."""

    def __init__(self, model: ModelId, codec: str, *, spread: bool, failed: Callable[[PeerId], None]) -> None:
        """spread: whether the gates of experts that nobody hosts go to the others; failed: told of peers that did, in
        the thread that sends. Raises InvalidInput for an unknown codec."""
        self.codec = get_codec(codec)
        self.spread = spread
        self._model, self._failed = model, failed
        self._helpers: dict[PeerId, Helper] = {}
        self._retired: list[Helper] = []
        self._lock = threading.Lock()
        self._switch = Switch()
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
        """The link is the dispatcher's from now on."""
        with self._lock:
            before = self._helpers.get(link.peer)
            if before is not None:
                self._retired.append(before)
            self._helpers[link.peer] = Helper(link, lease, 2 * link.delay)

    def check(self) -> None:
        """Notices links that have ended while nothing was sent."""
        for peer, helper in self.helpers.items():
            if helper.link.is_over():
                self.remove(peer)
                self._failed(peer)

    def renew(self, lease: ExpertLease) -> None:
        """What a peer says of itself now."""
        with self._lock:
            helper = self._helpers.get(lease.peer)
            if helper is not None:
                helper.lease, helper.experts = lease, frozenset(lease.experts)

    def remove(self, peer: PeerId) -> None:
        """It is asked nothing new."""
        with self._lock:
            helper = self._helpers.pop(peer, None)
            if helper is not None:
                self._retired.append(helper)

    def close(self) -> None:
        """When nothing is sent any more."""
        for peer in list(self._helpers):
            self.remove(peer)
        self._sweep()

    def send(self, layer: int, rows: Tensor, experts: Tensor, gates: Tensor, traffic: Traffic) -> Callable[[], Tensor]:
        """See `Exchange`. Raises Rejected("finite"), Unreachable naming the layer and the expert."""
        self._sweep()
        forward = Forward(self, layer, rows, experts, gates, traffic)
        forward.start()
        return forward.sum

    def gradients(
        self, layer: int, rows: Tensor, experts: Tensor, gates: Tensor, outer: Tensor, traffic: Traffic
    ) -> tuple[Tensor, Tensor]:
        """See `Exchange`. Raises as `send` does."""
        self._sweep()
        forward = Forward(self, layer, rows, experts, gates, traffic, outer)
        forward.start()
        return forward.gradients()

    def wait(self, helpers: Sequence[Helper], seconds: float) -> None:
        self._switch.wait([helper.link for helper in helpers], seconds)

    def lost(self, helper: Helper) -> None:
        """Its link has failed."""
        assert helper.link.failed is not None
        log.warning("%s", helper.link.failed.message)
        self.remove(helper.link.peer)
        self._failed(helper.link.peer)

    def count(self, **more: int) -> None:
        for name, number in more.items():
            self._counts[name] += number

    def waited(self, seconds: float) -> None:
        self._seconds += seconds

    @property
    def model(self) -> ModelId:
        return self._model

    def _sweep(self) -> None:
        with self._lock:
            retired, self._retired = self._retired, []
            for helper in retired:
                for i in (0, 1):
                    self._gone_bytes[i] += helper.link.traffic[i]
                if helper.link.failed is None:
                    helper.link.close()


class Forward:
    """One layer's rows on their way through their experts, or the gradients on their way back."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        layer: int,
        rows: Tensor,
        experts: Tensor,
        gates: Tensor,
        traffic: Traffic,
        outer: Tensor | None = None,
    ) -> None:
        self._by, self._layer, self._traffic = dispatcher, layer, traffic
        self._version = traffic.version or VersionId(dispatcher.model)
        self._rows = rows.detach().to("cpu")
        self._outer = None if outer is None else outer.detach().float().to("cpu")
        self._gates = gates.detach().float().to("cpu")
        self._experts = experts.detach().to("cpu").reshape(-1)
        self._each = experts.shape[1]
        self._lost = torch.zeros_like(self._gates, dtype=torch.bool)
        self._done: list[Call] = []
        self._asked: set[Helper] = set()
        self._began = time.monotonic()

    def start(self) -> None:
        """All is on its way when this returns."""
        if not is_finite(self._rows) or not is_finite(self._gates):
            raise Rejected("finite", f"The hidden states before the experts of layer {self._layer} are not finite.")
        self._share(torch.arange(len(self._experts)))

    def sum(self) -> Tensor:
        """[T, H] float32."""
        self._collect()
        total = torch.zeros(self._rows.shape, dtype=torch.float32)
        for call in sorted(self._done, key=lambda call: call.order):
            assert call.rows is not None
            total.index_add_(0, call.own, call.rows)
        if not bool(self._lost.any()):
            return total
        self._traffic.note_spread(self._lost.sum(1))
        self._by.count(spread=int(self._lost.sum()))
        return total * self._scale().unsqueeze(1)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of rows [T, H] and gates [T, K], float32."""
        self._collect()
        of_rows, of_gates = torch.zeros(self._rows.shape), torch.zeros(self._gates.numel())
        for call in sorted(self._done, key=lambda call: call.order):
            assert call.rows is not None
            assert call.of_gates is not None
            of_rows.index_add_(0, call.own, call.rows)
            of_gates[call.gates] = call.of_gates
        return of_rows, of_gates.view(self._gates.shape)

    def _scale(self) -> Tensor:
        """[T]: the weight of the gates that are lost goes to the others in proportion."""
        left = self._gates.masked_fill(self._lost, 0.0).sum(1)
        if not bool((left > 0).all()):
            raise self._unreachable(self._experts[self._lost.reshape(-1)])
        return self._gates.sum(1) / left

    def _share(self, places: Tensor) -> None:
        """Sends pairs, by their places among the flat gates, to whoever is expected to be first."""
        helpers = [helper for helper in self._by.helpers.values() if helper.serves(self._layer, self._version)]
        by_peer = {helper.link.peer: helper for helper in helpers}
        offers = {peer: Offer(helper.experts, helper.latency, helper.pair_seconds) for peer, helper in by_peer.items()}
        experts = self._experts[places]
        numbers, counts = torch.unique(experts, return_counts=True)
        shares = assign(dict(zip(numbers.tolist(), counts.tolist(), strict=True)), offers)
        given = {expert for share in shares.values() for expert in share}
        orphans = [number for number in numbers.tolist() if number not in given]
        if orphans:
            if not (self._by.spread and self._traffic.may_spread):
                raise self._unreachable(torch.tensor(orphans))
            lost = torch.isin(experts, torch.tensor(orphans))
            self._lost.view(-1)[places[lost]] = True
            self._scale()
        for peer, share in shares.items():
            self._give(by_peer[peer], places[torch.isin(experts, torch.tensor(share))])

    def _give(self, helper: Helper, places: Tensor) -> None:
        own, row = torch.unique(places // self._each, return_inverse=True)
        now = time.monotonic()
        self._asked.add(helper)
        for first in range(0, len(own), MAX_CALL_ROWS):
            part = own[first : first + MAX_CALL_ROWS]
            inside = (row >= first) & (row < first + MAX_CALL_ROWS)
            where = places[inside]
            pairs = Pairs(row[inside] - first, self._experts[where], self._gates.view(-1)[where])
            what = ExpertCall(self._layer, self._version, len(part), len(where), self._outer is not None)
            call = Call(what, part, pairs, where, now, helper.latency + len(where) * helper.pair_seconds)
            outer = None if self._outer is None else self._outer[part]
            helper.calls.append(call)
            helper.link.send(
                canonical.encode(what), encode_call(self._by.codec, self._rows[part], pairs, outer), len(part)
            )
            self._by.count(calls=1, rows=len(part), pairs=len(where))

    def _collect(self) -> None:
        try:
            while waiting := [helper for helper in self._asked if helper.calls]:
                now = time.monotonic()
                self._by.wait(waiting, max(0.0, min(self._deadline(helper) for helper in waiting) - now))
                for helper in waiting:
                    self._hear(helper)
        finally:
            for helper in self._asked:
                for call in helper.calls:
                    call.dropped = True
            self._by.waited(time.monotonic() - self._began)

    def _hear(self, helper: Helper) -> None:
        now = time.monotonic()
        for body in helper.link.take():
            call = helper.calls.popleft()
            if call.dropped:
                continue
            try:
                call.rows, call.of_gates = decode_answer(self._by.codec, call.what, body, self._rows.shape[1])
            except Rejected as error:
                helper.calls.appendleft(call)
                helper.link.fail(self._blamed(helper, error.message))
                break
            helper.took(now - call.sent, call.what.pairs)
            self._done.append(call)
        if helper.link.failed is None and helper.calls and now >= self._deadline(helper):
            helper.link.fail(self._blamed(helper, f"no answer came within {now - helper.calls[0].sent:.1f} s."))
        if helper.link.failed is not None:
            self._by.lost(helper)
            calls = [call for call in helper.calls if not call.dropped]
            helper.calls.clear()
            self._by.count(retries=len(calls))
            if calls:
                self._share(torch.cat([call.gates for call in calls]))

    def _deadline(self, helper: Helper) -> float:
        """Of the oldest call under way to it."""
        call = helper.calls[0]
        others = [other for other in self._by.helpers.values() if other is not helper]
        there = {e for other in others if other.serves(self._layer, self._version) for e in other.experts}
        if there.issuperset(call.pairs.expert.tolist()):
            return call.sent + max(PATIENCE_SECONDS, PATIENT * call.expected)
        return call.sent + DEADLINE_SECONDS

    def _blamed(self, helper: Helper, what: str) -> PeerFailed:
        peer = helper.link.peer
        return PeerFailed(f"Expert host …{peer[-8:]}: {what}", peer)

    def _unreachable(self, experts: Tensor) -> Unreachable:
        found = [MissingExpert(self._layer, int(expert)) for expert in torch.unique(experts)]
        return Unreachable(
            f"Nobody serves {name_missing(found)} to the peer that hosts the rest of the layer.",
            "Join with a node that hosts it: p2pmodel join --experts",
        )
