"""One layer's rows on their way through experts on other peers: shared out, waited for, and added up."""

import time

import torch
from torch import Tensor

from p2pmodel.domain.errors import PeerFailed, Rejected, Unreachable
from p2pmodel.domain.experts import MAX_CALL_ROWS, ExpertCall, MissingExpert
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.ports import Buffer
from p2pmodel.engine.expert_calls import Pairs, answer_bytes, decode_answer, encode_call, finite_rows, is_finite
from p2pmodel.engine.remote_experts import ForwardContext
from p2pmodel.logic.experts import Offer, assign, name_missing
from p2pmodel.node.hosting.helpers import MOST_SECONDS, Call, Doubt, Helper, Helpers
from p2pmodel.wire import canonical
from p2pmodel.wire.frames import MAX_BODY_BYTES

MAX_CALL_BYTES = MAX_BODY_BYTES // 2
"""Of rows, and of the gradients that may come with them: what else is in a frame takes less than as much again."""
DEADLINE_SECONDS = 10.0
"""For an answer of a peer that nobody can stand in for."""
PATIENCE_SECONDS = 0.5
"""For one that somebody can, or longer where that is what it usually takes."""
PATIENT = 10.0
"""How many times the expected seconds an answer may take."""


class Forward:
    """One layer's rows on their way through their experts, or the gradients on their way back."""

    def __init__(
        self,
        helpers: Helpers,
        layer: int,
        rows: Tensor,
        experts: Tensor,
        gates: Tensor,
        context: ForwardContext,
        outer: Tensor | None = None,
    ) -> None:
        self._by, self._layer, self._context = helpers, layer, context
        self._version = context.version or VersionId(helpers.model)
        self._rows = rows.detach().to("cpu")
        self._outer = None if outer is None else outer.detach().float().to("cpu")
        self._gates = gates.detach().float().to("cpu")
        self._experts = experts.detach().to("cpu").reshape(-1)
        self._each = experts.shape[1]
        self._lost = torch.zeros_like(self._gates, dtype=torch.bool)
        self._bad = torch.zeros(len(self._rows), dtype=torch.bool)
        self._done: list[Call] = []
        self._asked: set[Helper] = set()
        self._began = time.monotonic()

    def start(self) -> None:
        """All is on its way when this returns."""
        if self._outer is None:
            self._bad = ~(finite_rows(self._rows) & finite_rows(self._gates))
            refused = len(self._bad) > 0 and bool(self._bad.all())
        else:
            refused = not all(is_finite(t) for t in (self._rows, self._gates, self._outer))
        if refused:
            what = "hidden states before" if self._outer is None else "gradients behind"
            # Not "finite": that is said of the bytes of a frame, and would be its sender's fault.
            raise Rejected("overflow", f"The {what} the experts of layer {self._layer} are not finite.")
        good = ~self._bad.repeat_interleave(self._each)
        self._share(good.nonzero().squeeze(1))

    def drop(self) -> None:
        """Nobody waits for what has not come."""
        for helper in self._asked:
            for call in helper.calls:
                call.dropped = True

    def sum(self) -> Tensor:
        """[T, H] float32; NaN for rows that are not finite, as a whole layer has it, which keeps to itself."""
        self._collect()
        total = torch.zeros(self._rows.shape, dtype=torch.float32)
        for call in sorted(self._done, key=lambda call: call.order):
            assert call.rows is not None
            total.index_add_(0, call.own, call.rows)
        if bool(self._lost.any()):
            self._context.note_spread(self._lost.sum(1))
            self._by.count(spread=int(self._lost.sum()))
            total *= self._scale().unsqueeze(1)
        total[self._bad] = torch.nan
        return total

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
        left = self._gates.masked_fill(self._lost, 0.0).sum(1).masked_fill(self._bad, 1.0)
        if not bool((left > 0).all()):
            raise self._unreachable(self._experts[self._lost.reshape(-1)])
        return self._gates.sum(1) / left

    def _share(self, places: Tensor, doubt: Doubt | None = None) -> None:
        """Sends pairs, by their places among the flat gates, to whoever is expected to be first."""
        there = [helper for helper in self._by.helpers.values() if helper.serves(self._layer, self._version)]
        by_peer = {helper.link.peer: helper for helper in there if doubt is None or helper is not doubt.by}
        offers = {peer: Offer(helper.experts, helper.latency, helper.pair_seconds) for peer, helper in by_peer.items()}
        experts = self._experts[places]
        numbers, counts = torch.unique(experts, return_counts=True)
        shares = assign(dict(zip(numbers.tolist(), counts.tolist(), strict=True)), offers)
        given = {expert for share in shares.values() for expert in share}
        orphans = [number for number in numbers.tolist() if number not in given]
        if orphans:
            if not (self._by.spread and self._context.may_spread):
                raise self._unreachable(torch.tensor(orphans))
            lost = torch.isin(experts, torch.tensor(orphans))
            self._lost.view(-1)[places[lost]] = True
            self._scale()
        for peer, share in shares.items():
            self._give(by_peer[peer], places[torch.isin(experts, torch.tensor(share))], doubt)

    def _give(self, helper: Helper, places: Tensor, doubt: Doubt | None) -> None:
        own, row = torch.unique(places // self._each, return_inverse=True)
        now, codec, width = time.monotonic(), self._by.codec, self._rows.shape[1]
        self._asked.add(helper)
        most = min(MAX_CALL_ROWS, max(1, MAX_CALL_BYTES // (2 * codec.size(1, width))))
        for first in range(0, len(own), most):
            part = own[first : first + most]
            inside = (row >= first) & (row < first + most)
            where = places[inside]
            pairs = Pairs(row[inside] - first, self._experts[where], self._gates.view(-1)[where])
            what = ExpertCall(self._layer, self._version, len(part), len(where), self._outer is not None)
            call = Call(what, part, pairs, where, now, helper.latency + len(where) * helper.pair_seconds, doubt)
            outer = None if self._outer is None else self._outer[part]
            body = encode_call(codec, self._rows[part], pairs, outer)
            helper.link.send(canonical.encode(what), body, len(part), answer_bytes(codec, what, width))
            helper.calls.append(call)
            if doubt is not None:
                doubt.open += 1
            self._by.count(calls=1, rows=len(part), pairs=len(where))

    def _collect(self) -> None:
        try:
            while waiting := [helper for helper in self._asked if helper.calls]:
                now = time.monotonic()
                self._by.wait(waiting, max(0.0, min(self._deadline(helper) for helper in waiting) - now))
                for helper in waiting:
                    if helper.calls:  # they may have been given to others since
                        self._hear(helper)
        finally:
            self._by.waited(time.monotonic() - self._began)

    def _hear(self, helper: Helper) -> None:
        now = time.monotonic()
        for body in helper.link.take():
            call = helper.calls.popleft()
            if not call.dropped and not self._take(helper, call, body, now):
                break
            helper.heard = now
        if helper.link.failed is None and helper.calls and now >= self._deadline(helper):
            self._blame(helper, f"no answer came within {now - self._since(helper):.1f} s.")
        elif helper.link.failed is not None:
            self._lose(helper)

    def _take(self, helper: Helper, call: Call, body: Buffer, now: float) -> bool:
        """False where the answer is nonsense; the helper has failed then, and the call is under way again."""
        try:
            call.rows, call.of_gates = decode_answer(self._by.codec, call.what, body, self._rows.shape[1])
        except Rejected as error:
            helper.calls.appendleft(call)
            helper.link.fail(self._failure(helper, error.message))
            return False
        helper.took(now - max(call.sent, helper.heard), call.what.pairs)
        finite = is_finite(call.rows) and (call.of_gates is None or is_finite(call.of_gates))
        if not finite and call.doubt is None and self._have_others(helper, call):
            self._by.count(retries=1)
            self._share(call.gates, Doubt(helper))
            return True
        # What no other peer makes finite either is the rows' doing, or the experts', and nobody's fault.
        if not finite and self._outer is not None:
            raise Rejected("overflow", f"The gradients of the experts of layer {self._layer} are not finite.")
        self._done.append(call)
        if call.doubt is not None:
            self._settle(call.doubt, finite)
        return True

    def _settle(self, doubt: Doubt, finite: bool) -> None:
        doubt.open -= 1
        doubt.shared |= not finite
        if not doubt.open and not doubt.shared and doubt.by.link.failed is None:
            self._blame(doubt.by, "its answer is not finite, and another peer's is.")

    def _blame(self, helper: Helper, what: str) -> None:
        helper.link.fail(self._failure(helper, what))
        self._lose(helper)

    def _lose(self, helper: Helper) -> None:
        """Its link has failed: others take over what it owes."""
        self._by.lost(helper)
        calls = [call for call in helper.calls if not call.dropped]
        helper.calls.clear()
        self._by.count(retries=len(calls))
        for call in calls:
            if call.doubt is not None:
                self._settle(call.doubt, finite=False)
        if calls:
            self._share(torch.cat([call.gates for call in calls]))

    def _since(self, helper: Helper) -> float:
        """Since when the oldest call under way to it is waited for."""
        return max(helper.calls[0].sent, helper.heard, self._began)

    def _deadline(self, helper: Helper) -> float:
        """Of the oldest call under way to it."""
        call = helper.calls[0]
        least = PATIENCE_SECONDS if self._have_others(helper, call) else DEADLINE_SECONDS
        return self._since(helper) + min(MOST_SECONDS, max(least, PATIENT * call.expected))

    def _have_others(self, helper: Helper, call: Call) -> bool:
        """Whether others can take over all of the call."""
        others = [other for other in self._by.helpers.values() if other is not helper]
        serving = (other for other in others if other.serves(call.what.layer, call.what.version))
        return {expert for other in serving for expert in other.experts}.issuperset(call.pairs.expert.tolist())

    def _failure(self, helper: Helper, what: str) -> PeerFailed:
        peer = helper.link.peer
        return PeerFailed(f"Expert host …{peer[-8:]}: {what}", peer)

    def _unreachable(self, experts: Tensor) -> Unreachable:
        found = [MissingExpert(self._layer, int(expert)) for expert in torch.unique(experts)]
        return Unreachable(
            f"Nobody serves {name_missing(found)} to the peer that hosts the rest of the layer.",
            "Join with a node that hosts it: p2pmodel join --experts",
        )
