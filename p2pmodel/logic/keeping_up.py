"""Which hosts count as hosts at all: those that serve the head, or have not had the time to.

A peer that stays at an older version serves nobody who asks for the head. It is left out where nodes decide what to
serve, so that others take its place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS, Lease

ADOPTING_SECONDS = 10 * LEASE_SECONDS
"""For a peer to fetch and fold a version: until then it counts where it serves the one before."""

AnyLease = TypeVar("AnyLease", Lease, ExpertLease)


@dataclass(frozen=True)
class Heads:
    """heads: versions that this node serves or served, each with when that began, the oldest first; all but the first
    are younger than ADOPTING_SECONDS, or the newest. ahead: those that follow, whose values are not here yet."""

    heads: tuple[tuple[VersionId, float], ...]
    ahead: tuple[VersionId, ...] = ()

    @classmethod
    def begin(cls, version: VersionId, now: float) -> "Heads":
        return cls(((version, now),))

    def after(self, head: VersionId, now: float, ahead: tuple[VersionId, ...] = ()) -> "Heads":
        heads = self.heads if self.heads[-1][0] == head else (*self.heads, (head, now))
        settled = max((at for at, (_, since) in enumerate(heads) if since <= now - ADOPTING_SECONDS), default=0)
        return Heads(heads[settled:], ahead)

    def keeps_up(self, lease: Lease | ExpertLease) -> bool:
        return not {*self.ahead, *(version for version, _ in self.heads)}.isdisjoint(lease.versions)

    def hosts(self, leases: Iterable[AnyLease], own: PeerId) -> list[AnyLease]:
        """Of those leases that keep up, and of the peer that asks."""
        return [lease for lease in leases if lease.peer == own or self.keeps_up(lease)]
