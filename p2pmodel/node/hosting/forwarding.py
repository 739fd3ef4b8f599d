"""One layer's rows on their way through experts on other peers: shared out, waited for, and added up."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2pmodel.domain.errors import PeerFailed, Rejected, Unreachable
from p2pmodel.domain.experts import MAX_CALL_ROWS, ExpertCall, ExpertLease, MissingExpert
from p2pmodel.domain.ids import VersionId
from p2pmodel.engine.expert_calls import Pairs, decode_answer, encode_call, is_finite
from p2pmodel.engine.remote_experts import Traffic
from p2pmodel.logic.experts import MEMORY, Offer, assign, name_missing
from p2pmodel.swarm.expert_link import ExpertLink
from p2pmodel.wire import canonical
from p2pmodel.wire.frames import MAX_BODY_BYTES

if TYPE_CHECKING:
    from p2pmodel.node.hosting.dispatching import Dispatcher

MAX_CALL_BYTES = MAX_BODY_BYTES // 2
"""Of rows, and of the gradients that may come with them: what else is in a frame takes less than as much again."""
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


class Forward:
    """One layer's rows on their way through their experts, or the gradients on their way back."""

    def __init__(
        self,
        dispatcher: "Dispatcher",
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
        most = min(MAX_CALL_ROWS, max(1, MAX_CALL_BYTES // (2 * self._by.codec.size(1, self._rows.shape[1]))))
        for first in range(0, len(own), most):
            part = own[first : first + most]
            inside = (row >= first) & (row < first + most)
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
