"""The computation behind a chain of streams: sessions with their caches, and steps from bytes to bytes."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from p2pmodel.domain.errors import Busy, NotFound, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import ModelId, VersionId
from p2pmodel.domain.ports import Buffer, Noted
from p2pmodel.domain.swarm import PREFIX_BLOCK, SessionRequest, Span
from p2pmodel.engine import family
from p2pmodel.engine.batching import SessionsCache
from p2pmodel.engine.cache import StageCache
from p2pmodel.engine.prefixes import PrefixStore, Trail
from p2pmodel.engine.remote_experts import serving
from p2pmodel.engine.stage import Stage
from p2pmodel.engine.steps import Note
from p2pmodel.engine.trial import can_batch
from p2pmodel.engine.tuning import TrainingSession, Tuner
from p2pmodel.engine.vectors import SessionVectors
from p2pmodel.engine.versions import State, VersionTable, stack_states, weights_key
from p2pmodel.tensors.codecs import Codec, get_codec
from p2pmodel.tensors.smear import check_pools, is_expert

log = logging.getLogger(__name__)

MEASURED_PROMPT = 16
MEASURED_STEPS = 12


@dataclass(eq=False, slots=True)
class InferenceSession:
    """The handle of one session. trail: None where nothing can be found again; mask [B, seen] bool: which tokens may be
    attended to, None for all of them; weights: those of the same have the same weights. A step that fails leaves its
    cache between two tokens: the session is broken then."""

    span: Span
    rows: int
    codec: Codec
    state: State
    cache: StageCache
    trail: Trail | None = None
    mask: Tensor | None = None
    begun: bool = False
    broken: bool = False
    weights: tuple[int, ...] = ()
    version: VersionId | None = None
    """Of the experts that are elsewhere."""

    @property
    def room(self) -> int:
        """Positions that its cache may take."""
        return self.rows * self.cache.max_tokens


@dataclass(eq=False, slots=True)
class Work:
    """A step that fits its session: hidden [B, T, H]."""

    session: InferenceSession
    hidden: Tensor
    note: Note
    body: Buffer


Handle = InferenceSession | TrainingSession


class Runner:
    """A `StageRunner`. max_cached_tokens: how many positions all open sessions together may ask for, whatever part of
    the hosted span each of them runs; max_graph_bytes: what sessions that train may keep for their gradients."""

    def __init__(
        self,
        stage: Stage,
        model: ModelId,
        versions: VersionTable,
        *,
        max_cached_tokens: int,
        max_graph_bytes: int = 1 << 30,
    ) -> None:
        self._stage = stage
        self._model = model
        self._versions = versions
        self._max_cached_tokens = max_cached_tokens
        self._cached_tokens = 0
        self._lock = threading.Lock()
        self._shares_forwards = can_batch(stage)
        self._prefixes = PrefixStore()
        self._vectors = SessionVectors(stage)
        self._tuner = Tuner(stage, self._vectors, max_graph_bytes)

    @property
    def cached_tokens(self) -> int:
        """Positions that open sessions have been promised."""
        return self._cached_tokens

    @property
    def max_cached_tokens(self) -> int:
        return self._max_cached_tokens

    @property
    def retained_tokens(self) -> int:
        """Of ended sessions, which give way to new ones."""
        with self._lock:
            return self._prefixes.retained_tokens

    @property
    def graph_bytes(self) -> int:
        """Of micro-batches that wait for their gradients."""
        return self._tuner.held_bytes

    def open(self, request: SessionRequest) -> Handle:
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
        if request.training:
            return self._tuner.open(request, codec, state)
        cache = stage.new_cache(request.span, request.max_tokens, request.rewinds)
        session = InferenceSession(request.span, request.rows, codec, state, cache, weights=weights_key(state))
        if stage.is_trunk:
            session.version = request.version
        with self._lock:
            if self._cached_tokens + session.room > self._max_cached_tokens:
                raise Busy("This stage has no room for another session.", "Try another peer, or ask for fewer tokens.")
            self._cached_tokens += session.room
            # What routers saw of a beginning is not kept with it.
            if request.rows == 1 and cache.keeps_all and not any(map(is_expert, state)):
                scope = (request.version, request.span, request.codec)
                keys = request.prefix[: request.max_tokens // PREFIX_BLOCK]
                session.trail = self._prefixes.begin(scope, codec.size(1, stage.width), cache, keys)
            self._prefixes.shrink(self._max_cached_tokens - self._cached_tokens)
        return session

    def known(self, handle: Handle) -> tuple[bytes, ...]:
        """See `StageRunner`."""
        trail = None if isinstance(handle, TrainingSession) else handle.trail
        return tuple(trail.outgoing.keys[: trail.found]) if trail else ()

    def step(self, batch: Sequence[tuple[Handle, int, bytes, Buffer]]) -> list[Buffer | Noted | Exception]:
        """See `StageRunner`. The meta of a step is that of a `Note`, or of a `Microbatch` where the session trains.
        Single tokens of sessions that run the same span share a forward; everything else has one of its own."""
        outputs: dict[int, Buffer | Noted | Exception] = {}
        works: dict[int, Work] = {}
        for index, (handle, position, meta, body) in enumerate(batch):
            if isinstance(handle, TrainingSession):
                outputs[index] = self._trained(handle, position, meta, body)
        # The mode belongs to the thread, and the thread to whoever calls.
        with torch.inference_mode():
            for index, (handle, position, meta, body) in enumerate(batch):
                if isinstance(handle, InferenceSession):
                    work = self._prepared(handle, position, meta, body)
                    if isinstance(work, Work):
                        works[index] = work
                    else:
                        outputs[index] = work
            for group in self._groups(works):
                outputs.update(zip(group, self._run([works[index] for index in group]), strict=True))
        return [outputs[index] for index in range(len(batch))]

    def load(self, handle: Handle, body: Buffer) -> None:
        """See `StageRunner`. Raises Rejected: a session that does not train takes vectors before its first step."""
        if isinstance(handle, TrainingSession):
            self._tuner.load(handle, body)
            return
        if handle.begun:
            raise Rejected("frame", "A session's vectors come before its first step.")
        own = self._vectors.read(body, handle.span, by_row=False)
        state = {**handle.state, **own}
        check_pools(state)
        handle.state = state
        if handle.trail:
            self._forget(handle)

    def backward(self, handle: Handle, position: int, body: Buffer) -> Buffer:
        """See `StageRunner`."""
        if not isinstance(handle, TrainingSession):
            raise Rejected("frame", "Only a session that trains gives gradients.")
        try:
            with serving(handle.version, may_spread=False):
                return self._tuner.backward(handle, position, body)
        except family.FAMILY_ERRORS as error:
            raise self._failed(handle.reel.span, error) from None

    def close(self, handle: Handle) -> None:
        if isinstance(handle, TrainingSession):
            self._tuner.close(handle)
            return
        with self._lock:
            self._cached_tokens -= handle.room
            if handle.trail:
                self._prefixes.end(handle.trail, keep=not handle.broken)
                self._prefixes.shrink(self._max_cached_tokens - self._cached_tokens)

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

    def _groups(self, works: Mapping[int, Work]) -> list[list[int]]:
        """The keys of those that share a forward, together."""
        groups: list[list[int]] = []
        alike: dict[tuple[Span, tuple[int, ...], VersionId | None], list[int]] = {}
        for index, work in works.items():
            key = work.session.span, work.session.weights, work.session.version
            if not (self._shares_forwards and _is_next_token(work)):
                groups.append([index])
            elif key in alike:
                alike[key].append(index)
            else:
                groups.append(alike.setdefault(key, [index]))
        return groups

    def _run(self, works: list[Work]) -> Sequence[Buffer | Noted | Exception]:
        """The outputs, or the forward's error for every one of `works`, whose sessions are broken then."""
        for work in works:
            work.session.broken = True
        try:
            with serving(works[0].session.version) as context:
                outputs = self._shared(works) if len(works) > 1 else [self._single(works[0])]
        except P2PModelError as error:
            return [error] * len(works)
        except family.FAMILY_ERRORS as error:
            return [self._failed(works[0].session.span, error)] * len(works)
        for work, output in zip(works, outputs, strict=True):
            work.session.broken = False
            self._remember(work, output)
        if context.spread is not None:
            for work in works:
                if work.session.trail:  # others may find the missing experts again
                    self._forget(work.session)
        return _noted(works, outputs, context.spread)

    def _trained(self, session: TrainingSession, number: int, meta: bytes, body: Buffer) -> Buffer | Exception:
        try:
            with serving(session.version, may_spread=False):
                return self._tuner.forward(session, number, meta, body)
        except P2PModelError as error:
            return error
        except family.FAMILY_ERRORS as error:
            return self._failed(session.reel.span, error)

    def _failed(self, span: Span, error: Exception) -> PeerFailed:
        log.error("layers %s could not be computed", span, exc_info=error)
        return PeerFailed(f"A stage could not compute layers {span}: {family.first_line(error)}.")

    def _remember(self, work: Work, output: Buffer) -> None:
        trail = work.session.trail
        if trail is None:
            return
        is_last = work.session.span.end == self._stage.checkpoint.layers
        with self._lock:
            self._prefixes.add(trail, work.body, None if is_last else output)

    def _single(self, work: Work) -> Buffer:
        session, note, cache = work.session, work.note, work.session.cache
        if note.order is not None:
            cache.reorder(note.order)
            session.mask = None if session.mask is None else session.mask[note.order]
        if note.mask is not None or session.mask is not None:
            session.mask = torch.cat(
                [
                    torch.ones(session.rows, cache.seen, dtype=torch.bool) if session.mask is None else session.mask,
                    torch.ones(work.hidden.shape[:2], dtype=torch.bool) if note.mask is None else note.mask,
                ],
                dim=1,
            )
        # As the client called it: recurrent families are told of padding once, the others at every step.
        mask = None if note.mask is None or session.mask is None else session.mask.long()
        output = self._stage.forward(
            work.hidden, cache, session.span, position_ids=note.positions, attention_mask=mask, vectors=session.state
        )
        return self._encoded(work, output)

    def _shared(self, works: Sequence[Work]) -> list[Buffer]:
        sessions = [work.session for work in works]
        rows = [session.rows for session in sessions]
        batch = SessionsCache(
            [session.cache for session in sessions], rows, self._stage.base.config._attn_implementation
        )
        vectors = stack_states([session.state for session in sessions], rows)
        hidden = torch.cat([work.hidden for work in works])
        output = self._stage.forward_sessions(hidden, batch, sessions[0].span, vectors=vectors)
        return [self._encoded(work, part) for work, part in zip(works, torch.split(output, rows), strict=True)]

    def _encoded(self, work: Work, output: Tensor) -> Buffer:
        """The last stage sends no more than the client needs."""
        session, wanted = work.session, work.note.wanted
        if wanted is not None and session.span.end == self._stage.checkpoint.layers:
            if not wanted:
                return b""
            output = output[:, -wanted:]
        return session.codec.encode(output.reshape(1, -1, output.shape[-1]))

    def _prepared(self, session: InferenceSession, position: int, meta: bytes, body: Buffer) -> Work | Exception:
        """Of a step that fits its session. Rejected("frame" | "finite" | …) of one that does not."""
        try:
            hidden = self._read(session, position, body)
            note = Note.decode(meta, session.rows, hidden.shape[1])
            if session.trail and (note.mask is not None or note.positions is not None):
                self._forget(session)
            self._go_to(session, position)
        except P2PModelError as error:
            return error
        return Work(session, hidden, note, body)

    def _read(self, session: InferenceSession, position: int, body: Buffer) -> Tensor:
        """[B, T, H] of the body."""
        width, size = self._stage.width, memoryview(body).nbytes
        count = size // session.codec.size(1, width)
        tokens, rest = divmod(count, session.rows)
        if session.broken or not tokens or rest or session.codec.size(count, width) != size:
            raise Rejected("frame", f"A step of {size} bytes holds no hidden states of width {width}, or is too late.")
        if position + tokens > session.cache.max_tokens:
            raise Rejected("frame", f"A step goes beyond the {session.cache.max_tokens} tokens of its session.")
        hidden = session.codec.decode(body, count, width)
        if not bool(hidden.sum(dtype=torch.float32).isfinite()):  # one pass: infinities and NaNs stay in a sum
            raise Rejected("finite", "The hidden states of a step are not finite.")
        return hidden.view(session.rows, tokens, width)

    def _go_to(self, session: InferenceSession, position: int) -> None:
        cache = session.cache
        if session.trail and position < cache.seen:
            with self._lock:  # a session that opens may be reading what is about to be overwritten
                self._prefixes.cut(session.trail, position)
        try:
            if not session.begun and position < cache.seen:
                cache.start_at(position)
            elif cache.rewinds:
                cache.rewind(position)
            elif position != cache.seen:
                raise ValueError(f"a step is at position {position}, but its session at {cache.seen}")
        except ValueError as error:
            raise Rejected("frame", f"This step cannot be taken: {error}.") from None
        session.begun = True
        session.mask = None if session.mask is None else session.mask[:, :position]

    def _forget(self, session: InferenceSession) -> None:
        """What depends on a mask is not what its bytes say."""
        assert session.trail is not None
        with self._lock:
            self._prefixes.end(session.trail, keep=False)
        session.trail = None


def _noted(
    works: Sequence[Work], outputs: Sequence[Buffer], spread: Tensor | None
) -> Sequence[Buffer | Noted | Exception]:
    """The outputs of those whose gates were spread say so, and of those whose routers decided, how. spread: of all
    their rows, one after another."""
    counts = [work.hidden.shape[0] * work.hidden.shape[1] for work in works]
    parts = [None] * len(works) if spread is None else [int(part.sum()) for part in torch.split(spread, counts)]
    noted: list[Buffer | Noted | Exception] = []
    for work, output, lost in zip(works, outputs, parts, strict=True):
        course = work.session.cache.course
        decided = None if course is None else course.decided()
        if not lost and decided is None:
            noted.append(output)
            continue
        note = replace(work.note, spread=work.note.spread + (lost or 0))
        if decided is not None:
            layers, shares = decided
            before = note.shares
            if before is not None and before.shape == shares.shape:
                shares = shares + before
            note = replace(note, routed=note.routed + layers, shares=shares)
        noted.append(Noted(output, note.encode()))
    return noted


def _is_next_token(work: Work) -> bool:
    note, session = work.note, work.session
    plain = note.mask is None and note.positions is None and note.order is None and session.mask is None
    return plain and work.hidden.shape[1] == 1 and session.cache.seen > 0
