"""What one room needs of another, as protocols: rooms of floor 2 meet here, not by import."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from p2pmodel.domain.experts import ExpertOpening
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.swarm import SessionRequest

Buffer = bytes | bytearray | memoryview


class Noted(NamedTuple):
    """An output that has something to say: `meta` goes on in place of the one that came."""

    body: Buffer
    meta: bytes


class StageRunner(Protocol):
    """The computation behind a chain of streams. All but `open` and `known` are called from one thread, the compute
    thread; `open` from the thread that admits sessions. A session's handle is the runner's own object."""

    def open(self, request: SessionRequest) -> Any:
        """Raises P2PModelError when the span, version, codec or room for max_tokens cannot be had."""

    def known(self, handle: Any) -> tuple[bytes, ...]:
        """Of a session that was just opened: a key for each block of tokens that need not be sent, since the runner
        knows the beginning of the session; the next stage finds its own part of it by these keys. The first step is
        at the position up to which all stages know it."""

    def step(self, batch: Sequence[tuple[Any, int, bytes, Buffer]]) -> Sequence[Buffer | Noted | Exception]:
        """Each item is (handle, position of the first token, meta, encoded hidden states); at most one item a session.
        Returns the encoded outputs in the same order; an exception in an item's place ends that session alone."""

    def load(self, handle: Any, body: Buffer) -> None:
        """`body` is a blob of slot tensors, the session's own from here on. Raises P2PModelError."""

    def backward(self, handle: Any, position: int, body: Buffer) -> Buffer:
        """The gradients of the micro-batch at `position`, from those of its output, for the hop before. Raises
        P2PModelError."""

    def close(self, handle: Any) -> None:
        """Frees the session's cache. Called exactly once for every opened session."""


class ExpertRunner(Protocol):
    """The computation behind an expert host's streams. `open` may be called from any thread, `compute` from one."""

    def open(self, opening: ExpertOpening) -> Any:
        """The handle of a trunk. Raises P2PModelError when its model or codec cannot be had."""

    def max_body(self, handle: Any) -> int:
        """Bytes of the largest call that this trunk may make."""

    def compute(self, batch: Sequence[tuple[Any, bytes, Buffer]]) -> Sequence[Buffer | Exception]:
        """Each item is (handle, meta: an `ExpertCall`, body: see `engine.expert_calls`). Returns the answers in the
        same order; an exception in an item's place is for that item alone."""


class BlobSource(Protocol):
    """Verified bytes by digest; what the blob streams serve from."""

    def size(self, digest: Digest) -> int | None:
        """None when it is not here."""

    def read(self, digest: Digest, offset: int, length: int) -> bytes: ...


class BlobSink(Protocol):
    """Where a blob goes while it arrives. `finish` verifies the digest and makes it visible; `abort` leaves nothing."""

    def write(self, chunk: Buffer) -> None: ...

    def finish(self) -> None:
        """Raises Rejected("digest", …) when the bytes are not what was asked for."""

    def abort(self) -> None: ...


MakeSink = Callable[[Digest, int], BlobSink]
