"""The computation behind an expert host's streams: calls of several trunks, from bytes to bytes."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from p2pmodel.domain.errors import NotFound, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.experts import MAX_CALL_ROWS, ExpertCall, ExpertOpening
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.ports import Buffer
from p2pmodel.engine import family
from p2pmodel.engine.expert_calls import Pairs, decode_call, encode_gradients, max_call_bytes
from p2pmodel.engine.experts import ExpertShard
from p2pmodel.engine.versions import State, VersionTable
from p2pmodel.tensors.codecs import Codec, get_codec
from p2pmodel.wire import canonical
from p2pmodel.wire.frames import MAX_META_BYTES

log = logging.getLogger(__name__)

MEASURED_CALLS = 8


@dataclass(frozen=True, eq=False)
class HostedExperts:
    """Experts that are loaded, with their versions."""

    shard: ExpertShard
    versions: VersionTable


@dataclass(frozen=True, eq=False)
class _Work:
    shard: ExpertShard
    call: ExpertCall
    codec: Codec
    state: State
    rows: Tensor
    pairs: Pairs
    outer: Tensor | None


class ShardRunner:
    """Implements `domain.ports.ExpertRunner`; the handle of a trunk is its codec. rows, pairs: how many were computed
    since the start; forwards: in how many forwards; loads: pairs by expert."""

    def __init__(self, experts: HostedExperts, model: ModelId) -> None:
        self._hosted: tuple[HostedExperts, ...] = (experts,)
        self._model = model
        self.rows = self.pairs = self.forwards = 0
        self.loads: Counter[int] = Counter()

    def take(self, experts: HostedExperts) -> None:
        """Beside what is there, which still computes what it alone has, until it is dropped."""
        self._hosted = (experts, *self._hosted)

    def drop(self, experts: HostedExperts) -> None:
        self._hosted = tuple(one for one in self._hosted if one is not experts)

    def open(self, opening: ExpertOpening) -> Codec:
        """Raises NotFound for another model, InvalidInput for an unknown codec."""
        if opening.model != self._model:
            raise NotFound("This peer hosts experts of another model.")
        return get_codec(opening.codec)

    def max_body(self, handle: Codec) -> int:
        """See `domain.ports.ExpertRunner`."""
        return max_call_bytes(handle, self._hosted[0].shard.width)

    def compute(self, batch: Sequence[tuple[Codec, bytes, Buffer]]) -> list[Buffer | Exception]:
        """Calls for the same layer at the same version share a forward, whoever sent them, as long as they have no more
        rows together than one may have."""
        outputs: dict[int, Buffer | Exception] = {}
        groups: dict[tuple[int, int, int, int], list[dict[int, _Work]]] = {}
        for index, (codec, meta, body) in enumerate(batch):
            try:
                work = self._read(codec, meta, body)
            except P2PModelError as error:
                outputs[index] = error
                continue
            key = id(work.shard), work.call.layer, id(work.state), index if work.call.gradients else -1
            alike = groups.setdefault(key, [{}])
            if sum(other.call.rows for other in alike[-1].values()) + work.call.rows > MAX_CALL_ROWS:
                alike.append({})
            alike[-1][index] = work
        for works in chain.from_iterable(groups.values()):
            outputs.update(zip(works, self._run(list(works.values())), strict=True))
        return [outputs[index] for index in range(len(batch))]

    def measure(self) -> float:
        """Seconds that one row takes through one expert: the median of a few."""
        shard, seconds = self._hosted[0].shard, []
        layer = min(shard.counts)
        rows = torch.randn(1, shard.width, generator=torch.Generator().manual_seed(0))
        for number in range(MEASURED_CALLS):
            expert = torch.tensor([shard.experts[number % len(shard.experts)]])
            began = time.perf_counter()
            with torch.inference_mode():
                shard.compute(layer, rows, Pairs(torch.zeros_like(expert), expert, torch.ones(1))).cpu()
            seconds.append(time.perf_counter() - began)
        return sorted(seconds)[len(seconds) // 2]

    def _read(self, codec: Codec, meta: bytes, body: Buffer) -> _Work:
        call = canonical.decode(meta, ExpertCall, MAX_META_BYTES)
        current = self._hosted[0]
        rows, outer, pairs = decode_call(codec, call, body, current.shard.width)
        # A trunk that has read an earlier lease asks for what is about to go.
        hosted = next((one for one in self._hosted if one.shard.has(call.layer, pairs)), current)
        hosted.shard.check(call.layer, pairs)
        if call.pairs > call.rows * len(hosted.shard.experts):
            raise Rejected("shape", "A call asks for more experts of its rows than this peer hosts.")
        return _Work(hosted.shard, call, codec, hosted.versions.get(call.version), rows, pairs, outer)

    def _run(self, works: Sequence[_Work]) -> Sequence[Buffer | Exception]:
        try:
            if works[0].outer is not None:
                return [self._gradients(works[0], works[0].outer)]
            with torch.inference_mode():
                return self._forward(works)
        except P2PModelError as error:
            return [error] * len(works)
        except family.FAMILY_ERRORS as error:
            log.error("experts of layer %d could not be computed", works[0].call.layer, exc_info=error)
            failed = PeerFailed(f"Experts of layer {works[0].call.layer} could not be computed.")
            return [failed] * len(works)

    def _forward(self, works: Sequence[_Work]) -> list[Buffer]:
        layer, state, counts = works[0].call.layer, works[0].state, [work.call.rows for work in works]
        starts = [sum(counts[:number]) for number in range(len(works))]
        pairs = Pairs(
            torch.cat([work.pairs.row + start for work, start in zip(works, starts, strict=True)]),
            torch.cat([work.pairs.expert for work in works]),
            torch.cat([work.pairs.gate for work in works]),
        )
        self._count(sum(counts), pairs)
        shard = works[0].shard
        out = shard.compute(layer, torch.cat([work.rows.to(shard.dtype) for work in works]), pairs, state)
        return [
            work.codec.encode(part.unsqueeze(0)) for work, part in zip(works, torch.split(out, counts), strict=True)
        ]

    def _gradients(self, work: _Work, outer: Tensor) -> Buffer:
        self._count(work.call.rows, work.pairs)
        rows, gates = work.shard.gradients(work.call.layer, work.rows, work.pairs, outer, work.state)
        return encode_gradients(work.codec, rows, gates)

    def _count(self, rows: int, pairs: Pairs) -> None:
        self.rows += rows
        self.pairs += len(pairs)
        self.forwards += 1
        self.loads.update(pairs.expert.tolist())
