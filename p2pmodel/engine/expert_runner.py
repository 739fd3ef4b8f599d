"""The computation behind an expert host's streams: calls of several trunks, from bytes to bytes."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pmodel.domain.errors import NotFound, P2PModelError, PeerFailed
from p2pmodel.domain.experts import ExpertCall, ExpertOpening
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.ports import Buffer
from p2pmodel.engine import family
from p2pmodel.engine.expert_calls import Pairs, decode_call, encode_gradients
from p2pmodel.engine.experts import ExpertShard
from p2pmodel.engine.versions import State, VersionTable
from p2pmodel.tensors.codecs import Codec, get_codec
from p2pmodel.wire import canonical
from p2pmodel.wire.frames import MAX_META_BYTES

log = logging.getLogger(__name__)

MEASURED_CALLS = 8


@dataclass(frozen=True, eq=False)
class _Work:
    call: ExpertCall
    codec: Codec
    state: State
    rows: Tensor
    pairs: Pairs
    outer: Tensor | None


class ExpertRunner:
    """Implements `domain.ports.ExpertRunner`; the handle of a trunk is its codec. rows, pairs: how many were computed
    since the start; forwards: in how many forwards."""

    def __init__(self, shard: ExpertShard, model: ModelId, versions: VersionTable) -> None:
        self._shard, self._model, self._versions = shard, model, versions
        self.rows = self.pairs = self.forwards = 0

    def open(self, opening: ExpertOpening) -> Codec:
        """Raises NotFound for another model, InvalidInput for an unknown codec."""
        if opening.model != self._model:
            raise NotFound("This peer hosts experts of another model.")
        return get_codec(opening.codec)

    def compute(self, batch: Sequence[tuple[Codec, bytes, Buffer]]) -> list[Buffer | Exception]:
        """Calls for the same layer at the same version share a forward, whoever sent them."""
        outputs: dict[int, Buffer | Exception] = {}
        groups: dict[tuple[int, int, int], dict[int, _Work]] = {}
        for index, (codec, meta, body) in enumerate(batch):
            try:
                work = self._read(codec, meta, body)
            except P2PModelError as error:
                outputs[index] = error
                continue
            key = work.call.layer, id(work.state), index if work.call.gradients else -1
            groups.setdefault(key, {})[index] = work
        for works in groups.values():
            outputs.update(zip(works, self._run(list(works.values())), strict=True))
        return [outputs[index] for index in range(len(batch))]

    def measure(self) -> float:
        """Seconds that one row takes through one expert: the median of a few."""
        shard, seconds = self._shard, []
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
        state = self._versions.get(call.version)
        rows, outer, pairs = decode_call(codec, call, body, self._shard.width)
        self._shard.check(call.layer, pairs)
        return _Work(call, codec, state, rows, pairs, outer)

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
        self._count(sum(counts), len(pairs))
        out = self._shard.compute(layer, torch.cat([work.rows.to(self._shard.dtype) for work in works]), pairs, state)
        return [
            work.codec.encode(part.unsqueeze(0)) for work, part in zip(works, torch.split(out, counts), strict=True)
        ]

    def _gradients(self, work: _Work, outer: Tensor) -> Buffer:
        self._count(work.call.rows, len(work.pairs))
        rows, gates = self._shard.gradients(work.call.layer, work.rows, work.pairs, outer, work.state)
        return encode_gradients(work.codec, rows, gates)

    def _count(self, rows: int, pairs: int) -> None:
        self.rows += rows
        self.pairs += pairs
        self.forwards += 1
