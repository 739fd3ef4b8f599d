"""Who is there, and what they serve: presences, leases, routes, sessions."""

import itertools
from dataclasses import dataclass
from math import isfinite

from p2pmodel.domain.ids import ModelId, PeerId, VersionId, check_digest, check_peer
from p2pmodel.domain.model import BlobRef

LEASE_SECONDS = 30.0
"""The longest that a lease or a presence may be valid for."""


@dataclass(frozen=True, order=True)
class Span:
    """A contiguous half-open run of layers [start, end)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
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

    layer_seconds: measured time of one layer for one token; queue: sessions that wait or run; leaving: the last word of
    a peer that withdraws, since a DHT cannot forget.
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

    def __post_init__(self) -> None:
        check_peer(self.peer, "lease peer")
        check_digest(self.model, "lease model")
        for version in self.versions:
            check_digest(version, "lease version")
        if not self.versions or len(self.versions) > 16:
            raise ValueError("a lease names 1 to 16 versions")
        if not (isfinite(self.layer_seconds) and self.layer_seconds > 0 and isfinite(self.expires) and self.queue >= 0):
            raise ValueError("lease figures are out of range")


@dataclass(frozen=True)
class Presence:
    """A peer's signed word that it takes part in `model`: how to reach it, and its gossip child's own key.

    addresses and gossip_addresses are full multiaddrs (`/ip4/…/tcp/…/p2p/…`).
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
        everything = (*self.addresses, *self.gossip_addresses, *self.roles, self.software, self.gossip_peer)
        if len(everything) > 64 or any(len(text) > 256 for text in everything) or not isfinite(self.expires):
            raise ValueError("presence is too large")


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

    codec: name of the activation codec; max_tokens: how many positions the stage has to keep room for. A session keeps
    its version to its end.
    """

    session: str
    model: ModelId
    version: VersionId
    codec: str
    span: Span
    max_tokens: int

    def __post_init__(self) -> None:
        check_digest(self.model, "session model")
        check_digest(self.version, "session version")
        if len(self.session) != 32 or not 1 <= self.max_tokens <= 1 << 20 or len(self.codec) > 32:
            raise ValueError("session request is out of range")


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
        if len(self.name) > 64:
            raise ValueError("lineage name is too long")
