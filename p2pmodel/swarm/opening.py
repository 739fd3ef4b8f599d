"""What the control frames of a chain say: how a session opens, and why one ends."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise

from p2pmodel.domain import errors
from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId, check_peer
from p2pmodel.domain.swarm import Hop, Route, SessionRequest
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind

CHAIN = "p2pmodel/chain/1"
SINK = "p2pmodel/sink/1"
MAX_HOPS = 256
MAX_TEXT = 1000

_SESSION = re.compile(r"[0-9a-f]{32}")
_ASKED_WRONGLY = (errors.Rejected, errors.InvalidInput, errors.UsageError)
"""No other peer would do better: these reach the caller as they are. Everything else is the peer's failure."""


@dataclass(frozen=True)
class Opening:
    """The first frame of every stream of a session. `request.span` is what the receiving stage runs, `hops` are the
    stages after it, `client` takes the last one's answers on its sink."""

    request: SessionRequest
    hops: tuple[Hop, ...]
    client: PeerId

    def __post_init__(self) -> None:
        if not _SESSION.fullmatch(self.request.session):
            raise ValueError("the session's name is not 32 hexadecimal digits")
        if len(self.hops) >= MAX_HOPS:
            raise ValueError(f"a route has at most {MAX_HOPS} hops")
        spans = [self.request.span, *(hop.span for hop in self.hops)]
        if any(a.end != b.start for a, b in pairwise(spans)):
            raise ValueError("the spans of the route do not follow each other")
        for hop in self.hops:
            check_peer(hop.peer, "hop")
        check_peer(self.client, "client")

    def onward(self, known: tuple[bytes, ...]) -> tuple[PeerId, str, "Opening"]:
        """The next peer, the protocol it is called by, and what it is told. known: see `StageRunner.known`; what the
        client is told in the end is what all stages know."""
        if not self.hops:
            return self.client, SINK, replace(self, request=replace(self.request, prefix=known))
        following = self.hops[0]
        request = replace(self.request, span=following.span, prefix=known)
        return following.peer, CHAIN, Opening(request, self.hops[1:], self.client)

    def frame(self) -> bytes:
        return frames.pack(Kind.OPEN, canonical.encode(self))

    @classmethod
    def read(cls, kind: Kind, meta: bytes) -> "Opening":
        """Raises Rejected("frame" | "size" | "schema" | "canonical")."""
        if kind is not Kind.OPEN:
            raise Rejected("frame", "A peer's first frame on a stream does not open a session.")
        return canonical.decode(meta, cls, frames.MAX_META_BYTES)


@dataclass(frozen=True)
class Failure:
    """The meta of an ERROR frame. error: a class of `domain.errors`; reason: a Rejected's; peer: who failed."""

    error: str
    message: str
    hint: str
    reason: str
    peer: str

    def __post_init__(self) -> None:
        if any(len(text) > MAX_TEXT for text in (self.error, self.message, self.hint, self.reason, self.peer)):
            raise ValueError("a failure's text is too long")

    @classmethod
    def of(cls, error: P2PModelError, reporter: PeerId) -> "Failure":
        """`reporter` is to blame, unless the error itself names a peer."""
        peer = error.peer if isinstance(error, PeerFailed) and error.peer else reporter
        reason = error.reason if isinstance(error, Rejected) else ""
        return cls(type(error).__name__, error.message[:MAX_TEXT], error.hint[:MAX_TEXT], reason[:MAX_TEXT], peer)

    def frame(self) -> bytes:
        return frames.pack(Kind.ERROR, canonical.encode(self))

    @classmethod
    def read(cls, meta: bytes) -> "Failure":
        """Raises Rejected("size" | "schema" | "canonical")."""
        return canonical.decode(meta, cls, frames.MAX_META_BYTES)

    def error_for(self, route: Route, reporter: PeerId) -> P2PModelError:
        """What the client raises: the named error where its request was at fault, else PeerFailed, with the named
        error as its `__cause__`. A peer outside of the route cannot be blamed: `reporter` is."""
        peer = self.peer if self.peer in {hop.peer for hop in route.hops} else reporter
        message, hint = plain(self.message), plain(self.hint)
        kind = getattr(errors, self.error, PeerFailed)
        if not (isinstance(kind, type) and issubclass(kind, P2PModelError)):
            kind = PeerFailed
        named = Rejected(plain(self.reason), message, hint) if kind is Rejected else kind(message, hint=hint)
        if isinstance(named, _ASKED_WRONGLY):
            return named
        failed = PeerFailed(message if peer[-8:] in message else f"Peer …{peer[-8:]}: {message}", peer, hint)
        failed.__cause__ = None if kind is PeerFailed else named
        return failed


def lost(peer: PeerId) -> PeerFailed:
    return PeerFailed(f"Peer …{peer[-8:]} broke off the stream.", peer)


def plain(text: str) -> str:
    """A peer's text on its way to a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
