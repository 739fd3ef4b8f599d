"""The stages behind one chain server: the one that takes new sessions, and while a node moves, the one before it.

A session belongs to the stage that it began on, so a move goes unnoticed by those that run.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from p2pmodel.domain.ports import Buffer, Noted
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import Stage
from p2pmodel.engine.versions import VersionTable
from p2pmodel.logic.pace import follow
from p2pmodel.tensors.codecs import get_codec

BUSY_SECONDS = 5.0
"""A session that computed nothing for this long keeps its cache, but nobody else waiting."""


class HostedStage:
    """A span that is loaded, with its versions. layer_seconds: of one layer for one token, as lately seen; ended: to be
    called when the last session of a retired stage has ended."""

    def __init__(self, stage: Stage, runner: Runner, versions: VersionTable, position_bytes: float = 0.0) -> None:
        """position_bytes: about what one position of KV cache takes."""
        self.position_bytes = position_bytes
        self.span, self.weight_bytes, self.width = stage.span, stage.weight_bytes, stage.width
        self.expert_counts = dict(stage.board.counts)
        self.runner, self.versions = runner, versions
        self.measured = self.layer_seconds = runner.measure()
        self.sessions = 0
        self.ended: Callable[[], None] | None = None

    def took(self, seconds: float) -> None:
        """One layer has computed one token of one session."""
        self.layer_seconds = follow(self.layer_seconds, self.measured, seconds)


@dataclass(eq=False, slots=True)
class Seat:
    """The handle of a session. token_bytes: what a step of one token of all its rows measures; 0 where it trains.
    codec: its name; row_bytes: what it makes of one hidden state."""

    hosted: HostedStage
    handle: Any
    layers: int
    token_bytes: int
    codec: str
    row_bytes: int
    active: float


class Stages:
    """A `StageRunner` that hands on to that of each session's stage. Thread-safe."""

    def __init__(self, first: HostedStage) -> None:
        self.current = first
        self._open_to_new = [first]
        self.coded: Counter[tuple[str, str, str]] = Counter()
        """Bytes of hidden states by codec, `received` or `sent`, and `encoded` or `raw`: as fp32 would have them."""
        self._seats: set[Seat] = set()
        self._lock = threading.Lock()

    @property
    def cached_tokens(self) -> int:
        """Positions that open sessions have been promised."""
        with self._lock:
            stages = {*self._open_to_new, *(seat.hosted for seat in self._seats)}
            return sum(stage.runner.cached_tokens for stage in stages)

    @property
    def busy(self) -> int:
        """How many sessions have computed something in the last BUSY_SECONDS."""
        since = time.monotonic() - BUSY_SECONDS
        with self._lock:
            return sum(seat.active >= since for seat in self._seats)

    def take(self, stage: HostedStage) -> HostedStage:
        """`stage` is the current one from now on. The one before, which is returned, goes on until it is retired."""
        with self._lock:
            before, self.current = self.current, stage
            self._open_to_new.insert(0, stage)
        return before

    def retire(self, stage: HostedStage, ended: Callable[[], None]) -> None:
        """No new session begins on `stage`; `ended` is called, in whatever thread, when the last one that runs has
        ended."""
        with self._lock:
            self._open_to_new.remove(stage)
            stage.ended = ended
            idle = not stage.sessions
        if idle:
            ended()

    def open(self, request: SessionRequest) -> Seat:
        """As `Runner.open`."""
        codec = get_codec(request.codec)
        with self._lock:
            stage = next((s for s in self._open_to_new if s.span.covers(request.span)), self.current)
            handle = stage.runner.open(request)
            stage.sessions += 1
            token_bytes = 0 if request.training else codec.size(request.rows, stage.width)
            row_bytes = codec.size(1, stage.width)
            seat = Seat(stage, handle, len(request.span), token_bytes, codec.name, row_bytes, time.monotonic())
            self._seats.add(seat)
        return seat

    def known(self, handle: Seat) -> tuple[bytes, ...]:
        return handle.hosted.runner.known(handle.handle)

    def step(self, batch: Sequence[tuple[Seat, int, bytes, Buffer]]) -> Sequence[Buffer | Noted | Exception]:
        stages = {seat.hosted for seat, *_ in batch}
        if len(stages) == 1:
            return self._step(stages.pop(), batch)
        outputs: dict[Seat, Buffer | Noted | Exception] = {}
        for stage in stages:
            part = [item for item in batch if item[0].hosted is stage]
            outputs.update(zip((seat for seat, *_ in part), self._step(stage, part), strict=True))
        return [outputs[seat] for seat, *_ in batch]

    def load(self, handle: Seat, body: Buffer) -> None:
        handle.hosted.runner.load(handle.handle, body)

    def backward(self, handle: Seat, position: int, body: Buffer) -> Buffer:
        handle.active = time.monotonic()
        return handle.hosted.runner.backward(handle.handle, position, body)

    def close(self, handle: Seat) -> None:
        with self._lock:
            self._seats.discard(handle)
            stage = handle.hosted
            stage.sessions -= 1
            ended = None if stage.sessions else stage.ended
        stage.runner.close(handle.handle)
        if ended:
            ended()

    def _step(
        self, stage: HostedStage, batch: Sequence[tuple[Seat, int, bytes, Buffer]]
    ) -> Sequence[Buffer | Noted | Exception]:
        began = time.monotonic()
        outputs = stage.runner.step([(seat.handle, position, meta, body) for seat, position, meta, body in batch])
        now = time.monotonic()
        for (seat, _, _, body), output in zip(batch, outputs, strict=False):
            seat.active = now
            self._count(seat, "received", body)
            if not isinstance(output, Exception):
                self._count(seat, "sent", output.body if isinstance(output, Noted) else output)
        seat, _, _, body = batch[0]
        # What several sessions share, a prompt, or a micro-batch, says little of what one token costs.
        if len(batch) == 1 and memoryview(body).nbytes == seat.token_bytes and not isinstance(outputs[0], Exception):
            stage.took((now - began) / seat.layers)
        return outputs

    def _count(self, seat: Seat, direction: str, body: Buffer) -> None:
        size = memoryview(body).nbytes
        self.coded[seat.codec, direction, "encoded"] += size
        self.coded[seat.codec, direction, "raw"] += size // seat.row_bytes * seat.hosted.width * 4


def scaled_bytes(stage: HostedStage, span: Span) -> int:
    """About what the weights of `span` measure, going by those of `stage`."""
    return stage.weight_bytes * len(span) // len(stage.span)
