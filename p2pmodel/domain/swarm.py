"""Who is there, and what they serve: presences, leases, routes, sessions."""

import itertools
import re
from dataclasses import dataclass
from math import isfinite

from p2pmodel.domain.ids import ModelId, PeerId, VersionId, check_digest, check_peer
from p2pmodel.domain.model import BlobRef, check_name

LEASE_SECONDS = 30.0
"""The longest that a lease or a presence may be valid for."""
CLAIM_SECONDS = 25.0
"""What a peer claims at a time: so whoever looks misses one that died within LEASE_SECONDS, the looking included."""
MAX_DELAYS = 16
MAX_DELAY_SECONDS = 60.0

MAX_LAYER = 1 << 16
"""That spans end before or at; Manifests have fewer layers."""
MAX_QUEUE = 1 << 16
LEAST_SECONDS, MOST_SECONDS = 1e-9, 60.0
"""Of what a lease says a layer or an expert takes for a token. Nobody waits longer; sums and quotients of these stay in
range."""
MOST_WORDS = 64
"""Of a presence: addresses, roles and names."""

MAX_ROWS = 256
"""Of one session: sequences of a batch, or beams."""

PREFIX_BLOCK = 32
"""Tokens: the unit in which beginnings of sessions are recognised."""
MAX_PREFIX_BLOCKS = 1024

_NAME = re.compile(r"[!-~]{1,32}")
_WORDS = re.compile(r"[ -~]{0,256}")
_ADDRESS = re.compile(r"(/[0-9A-Za-z._:%-]+)+")


def is_name(text: str) -> bool:
    """Of a dtype or a codec: 1 to 32 printable ASCII characters without spaces."""
    return _NAME.fullmatch(text) is not None


def as_claimed(seconds: float) -> float:
    """What was measured, as a lease may say it."""
    return min(max(seconds, LEAST_SECONDS), MOST_SECONDS)


@dataclass(frozen=True, order=True)
class Span:
    """A contiguous half-open run of layers [start, end)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= MAX_LAYER:
            raise ValueError(f"{self.start}:{self.end} is not a span of layers")

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.end

    def covers(self, other: "Span") -> bool:
        return self.start <= other.start and other.end <= self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True)
class Lease:
    """A peer's signed claim to serve `span` of `model` at `versions`, until `expires` (Unix seconds).

    layer_seconds: measured time of one layer for one token, `as_claimed`; queue: sessions that computed lately;
    leaving: the last word of a peer that withdraws, since a DHT cannot forget. delays: seconds one way, as measured by
    this peer, to peers that host what comes next, sorted by peer. moving: what it is loading, to serve it instead of
    `span`.
    """

    peer: PeerId
    model: ModelId
    span: Span
    dtype: str
    versions: tuple[VersionId, ...]
    layer_seconds: float
    queue: int
    leaving: bool
    expires: float
    delays: tuple[tuple[PeerId, float], ...] = ()
    moving: Span | None = None

    def __post_init__(self) -> None:
        check_peer(self.peer, "lease peer")
        check_digest(self.model, "lease model")
        for version in self.versions:
            check_digest(version, "lease version")
        if not self.versions or len(self.versions) > 16:
            raise ValueError("a lease names 1 to 16 versions")
        if not (LEAST_SECONDS <= self.layer_seconds <= MOST_SECONDS and 0 <= self.queue <= MAX_QUEUE):
            raise ValueError("lease figures are out of range")
        if not (isfinite(self.expires) and is_name(self.dtype)):
            raise ValueError("a lease's end or its dtype is out of range")
        others = [peer for peer, _ in self.delays]
        if len(others) > MAX_DELAYS or others != sorted(set(others)):
            raise ValueError(f"a lease names at most {MAX_DELAYS} delays, of different peers, sorted by peer")
        for peer, seconds in self.delays:
            check_peer(peer, "lease neighbour")
            if not 0 <= seconds <= MAX_DELAY_SECONDS:
                raise ValueError("a lease's delay is out of range")


@dataclass(frozen=True)
class Presence:
    """A peer's signed word that it takes part in `model`: how to reach it, and its gossip child's own key.

    addresses and gossip_addresses are full multiaddrs (`/ip4/…/tcp/…/p2p/…`). All text is printable ASCII, and an
    address has nothing that a shell would read: people are told to join there.
    """

    peer: PeerId
    model: ModelId
    addresses: tuple[str, ...]
    gossip_peer: str
    gossip_addresses: tuple[str, ...]
    roles: tuple[str, ...]
    software: str
    expires: float

    def __post_init__(self) -> None:
        check_peer(self.peer, "presence peer")
        check_digest(self.model, "presence model")
        addresses, words = (*self.addresses, *self.gossip_addresses), (*self.roles, self.software, self.gossip_peer)
        if len(addresses) + len(words) > MOST_WORDS or not isfinite(self.expires):
            raise ValueError("presence is too large")
        if not all(map(_WORDS.fullmatch, words)):
            raise ValueError("presence has a text that is too long, or not printable")
        if not all(len(address) <= 256 and _ADDRESS.fullmatch(address) for address in addresses):
            raise ValueError("presence has an address that is none")


@dataclass(frozen=True)
class Hop:
    """`span` of a route, to be run by `peer`; the span may be less than what the peer's lease covers."""

    peer: PeerId
    span: Span


@dataclass(frozen=True)
class Route:
    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        spans = [hop.span for hop in self.hops]
        if not spans or any(a.end != b.start for a, b in itertools.pairwise(spans)):
            raise ValueError("a route's spans have to follow each other")


@dataclass(frozen=True)
class SessionRequest:
    """What a stage needs to know to open a session: the rest of the route is in the frame around it.

    codec: name of the activation codec; max_tokens: how many positions of each of its rows the stage has to keep room
    for; rewinds: whether a step may go back to where the step before began, as speculative decoding does; prefix: the
    keys of the first blocks of tokens that it will be sent, for it to recognise (see `engine.prefixes`); training:
    its steps are micro-batches without a cache, of at most max_tokens tokens a row, whose gradients can be asked for.
    A session keeps its version to its end.
    """

    session: str
    model: ModelId
    version: VersionId
    codec: str
    span: Span
    max_tokens: int
    rows: int = 1
    rewinds: bool = False
    prefix: tuple[bytes, ...] = ()
    training: bool = False

    def __post_init__(self) -> None:
        check_digest(self.model, "session model")
        check_digest(self.version, "session version")
        if len(self.session) != 32 or not 1 <= self.max_tokens <= 1 << 20 or not is_name(self.codec):
            raise ValueError("session request is out of range")
        if not 1 <= self.rows <= MAX_ROWS:
            raise ValueError(f"a session has 1 to {MAX_ROWS} rows")
        if len(self.prefix) > MAX_PREFIX_BLOCKS or any(len(key) > 32 for key in self.prefix):
            raise ValueError("session prefix is out of range")


@dataclass(frozen=True)
class StepNote:
    """What a step of B rows and T tokens says beside its hidden states. Most say nothing.

    mask: a bit for each token, rows one after another, whether it may be attended to; empty for all of them.
    positions: B·T int32, little-endian, where they do not follow from the step's own; else empty.
    order: which row of the session each row goes on from, as beam search wants it; empty when nothing moves.
    wanted: of how many of the last tokens the client needs the output; None for all of them.
    spread: on the way back, how many gates were spread over others since nobody hosts their experts.
    routed, shares: on the way back, how many layers' routers have decided in this step, and the sum of their shares:
    for each row those of the version's modular experts, sorted by name, and of none; float32, little-endian.
    """

    mask: bytes = b""
    positions: bytes = b""
    order: tuple[int, ...] = ()
    wanted: int | None = None
    spread: int = 0
    routed: int = 0
    shares: bytes = b""


@dataclass(frozen=True)
class MicrobatchNote:
    """What a micro-batch of B rows and T tokens says. rows: B; mask, positions: as in StepNote; inputs: whether the
    client wants the gradient of the hidden states that it sent."""

    rows: int
    inputs: bool = False
    mask: bytes = b""
    positions: bytes = b""

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise ValueError(f"a micro-batch has 1 to {MAX_ROWS} rows")


@dataclass(frozen=True)
class LineageOffer:
    """What a peer answers when it is asked which lineages it takes part in."""

    model: ModelId
    name: str
    manifest: BlobRef
    head: VersionId

    def __post_init__(self) -> None:
        check_digest(self.model, "lineage model")
        check_digest(self.head, "lineage head")
        check_name(self.name)
