"""The computation behind a chain of streams: sessions with their caches, and steps from bytes to bytes."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pmodel.domain.errors import Busy, NotFound, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.cache import StageCache
from p2pmodel.engine.stage import Stage
from p2pmodel.engine.versions import State, VersionTable
from p2pmodel.tensors.codecs import Codec, get_codec

MEASURED_PROMPT = 16
MEASURED_STEPS = 12


@dataclass(eq=False, slots=True)
class StageSession:
    """The handle of one session. A step that fails leaves its cache between two tokens: the session is broken then."""

    span: Span
    codec: Codec
    state: State
    cache: StageCache
    broken: bool = False


class Runner:
    """A `StageRunner`. max_cached_tokens: how many positions all open sessions together may ask for, whatever part of
    the hosted span each of them runs."""

    def __init__(self, stage: Stage, model: ModelId, versions: VersionTable, *, max_cached_tokens: int) -> None:
        self._stage = stage
        self._model = model
        self._versions = versions
        self._max_cached_tokens = max_cached_tokens
        self._cached_tokens = 0
        self._lock = threading.Lock()

    @property
    def cached_tokens(self) -> int:
        """Positions that open sessions have been promised."""
        return self._cached_tokens

    def open(self, request: SessionRequest) -> StageSession:
        """Raises NotFound (model, span, version), InvalidInput (codec), Rejected("context"), Busy when it is full."""
        stage = self._stage
        if request.model != self._model:
            raise NotFound("This stage serves another model.")
        if not stage.span.covers(request.span):
            raise NotFound(f"This stage serves layers {stage.span}, not {request.span}.")
        if request.max_tokens > stage.checkpoint.context:
            raise Rejected(
                "context",
                f"A session of {request.max_tokens} tokens is longer than the model's context, "
                f"{stage.checkpoint.context}.",
            )
        state, codec = self._versions.get(request.version), get_codec(request.codec)
        with self._lock:
            if self._cached_tokens + request.max_tokens > self._max_cached_tokens:
                raise Busy("This stage has no room for another session.", "Try another peer, or ask for fewer tokens.")
            self._cached_tokens += request.max_tokens
        return StageSession(request.span, codec, state, stage.new_cache(request.span, request.max_tokens))

    def step(self, batch: Sequence[tuple[StageSession, int, bytes, Buffer]]) -> list[Buffer | Exception]:
        """See `StageRunner`. The meta of a step has to be empty."""
        # The mode belongs to the thread, and the thread to whoever calls.
        with torch.inference_mode():
            return [self._one(*item) for item in batch]

    def close(self, handle: StageSession) -> None:
        with self._lock:
            self._cached_tokens -= handle.cache.max_tokens

    def measure(self) -> float:
        """Seconds that one layer takes for one token: the median of a few decode steps on a cache of their own."""
        stage = self._stage
        cache = stage.new_cache(stage.span, MEASURED_PROMPT + MEASURED_STEPS)
        hidden = torch.randn(1, MEASURED_PROMPT, stage.width, generator=torch.Generator().manual_seed(0))
        seconds = []
        with torch.inference_mode():
            stage.forward(hidden, cache, stage.span)
            for _ in range(MEASURED_STEPS):
                begin = time.perf_counter()
                # A copy back to the host waits for the device.
                stage.forward(hidden[:, :1], cache, stage.span).cpu()
                seconds.append(time.perf_counter() - begin)
        return sorted(seconds)[len(seconds) // 2] / len(stage.span)

    def _one(self, session: StageSession, position: int, meta: bytes, body: Buffer) -> Buffer | Exception:
        try:
            hidden = self._read(session, position, meta, body)
            session.broken = True
            output = self._stage.forward(hidden, session.cache, session.span, vectors=session.state)
            session.broken = False
            return session.codec.encode(output)
        except P2PModelError as error:
            return error
        except RuntimeError as error:  # of torch: memory, devices
            return PeerFailed(f"A stage could not compute layers {session.span}: {error}.")

    def _read(self, session: StageSession, position: int, meta: bytes, body: Buffer) -> Tensor:
        """[1, T, H] of a step that fits its session. Raises Rejected("frame" | "finite")."""
        width, size = self._stage.width, memoryview(body).nbytes
        tokens = size // session.codec.size(1, width)
        if meta or session.broken or not tokens or session.codec.size(tokens, width) != size:
            raise Rejected("frame", f"A step of {size} bytes holds no hidden states of width {width}, or is too late.")
        if position != session.cache.seen:
            raise Rejected("frame", f"A step is at position {position}, but its session at {session.cache.seen}.")
        if position + tokens > session.cache.max_tokens:
            raise Rejected("frame", f"A step goes beyond the {session.cache.max_tokens} tokens of its session.")
        hidden = session.codec.decode(body, tokens, width)
        if not bool(torch.isfinite(hidden).all()):
            raise Rejected("finite", "The hidden states of a step are not finite.")
        return hidden
