"""What the person who runs a node wants to see at a glance, from what the node knows already: it asks nobody."""

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pmodel.domain.experts import describe
from p2pmodel.domain.ids import PatchId, PeerId, VersionId
from p2pmodel.domain.swarm import Lease
from p2pmodel.domain.version import Version
from p2pmodel.logic.routing import coverage
from p2pmodel.node.attendance import Attendance
from p2pmodel.node.community import Community
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.patches.patchbook import state_of
from p2pmodel.node.watching.lookout import unexpired
from p2pmodel.swarm.host import PeerHost

if TYPE_CHECKING:
    from p2pmodel.node.hosting.expert_hosting import ExpertHosting
    from p2pmodel.node.hosting.hosting import Hosting

RATE_SECONDS = 10.0
"""That tokens a second are the mean over."""
MOST_PATCHES, MOST_VERSIONS, MOST_PEERS = 6, 5, 12


@dataclass(frozen=True)
class PatchGlance:
    """One of this peer's own. state: as in `p2pmodel patch list`; accepts, rejects: verdicts so far on the candidates
    of the open round that merge it."""

    id: PatchId
    state: str
    accepts: int = 0
    rejects: int = 0


@dataclass(frozen=True)
class VersionGlance:
    """what: how it was made; loss: mean over the exam's domains in nats per byte, None where no verdict has scores;
    before: the same of its parent."""

    number: str
    id: VersionId
    what: str
    loss: float | None
    before: float | None


@dataclass(frozen=True)
class PeerGlance:
    """span: `0:3`, empty for a peer that hosts no layers."""

    peer: PeerId
    roles: tuple[str, ...]
    span: str


@dataclass(frozen=True)
class Glance:
    """tokens: computed here since the start; tokens_per_second: lately; coverage: hosts of each layer at the head;
    hosted: what this node computes, as a lease; None for one that hosts no whole layers, which `part` then describes.
    patches, versions: newest first; peers: without this one, `peer_count` of them in all."""

    peer: PeerId
    address: str
    uptime: float
    model: str
    head: str
    coverage: tuple[int, ...]
    hosted: Lease | None
    part: str
    sessions: int
    sessions_total: int
    failed: int
    tokens: int
    tokens_per_second: float
    round: int
    phase: str
    phase_seconds: float
    round_patches: int
    accepts: int
    threshold: int
    patches: tuple[PatchGlance, ...]
    patch_count: int
    versions: tuple[VersionGlance, ...]
    peers: tuple[PeerGlance, ...]
    peer_count: int


class Glancer:
    """Takes glances; each costs well under a millisecond as long as nothing has changed."""

    def __init__(
        self,
        host: PeerHost,
        lineage: Lineage,
        attendance: Attendance,
        community: Community,
        hosting: "Hosting | None",
        experts: "ExpertHosting | None" = None,
    ) -> None:
        self._host, self._lineage = host, lineage
        self._attendance, self._community, self._hosting = attendance, community, hosting
        self._experts = experts
        self._began = time.monotonic()
        self._tokens: deque[tuple[float, int]] = deque()

    def take(self) -> Glance:
        lineage, experts, now = self._lineage, self._experts, time.monotonic()
        state, head = self._community.round, lineage.served_head
        leases = {lease.peer: lease for lease in unexpired(self._attendance.leases) if not lease.leaving}
        hosted = self._hosting.lease(self._host.peer) if self._hosting else None
        if hosted:
            leases[hosted.peer] = hosted
        stats = self._hosting.stats if self._hosting else None
        tokens = stats.tokens if stats else 0
        mine = [patch for patch, header in list(lineage.patches.items()) if header.contributor == self._host.peer]
        others = sorted(
            (p for p in self._community.presences.values() if p.peer != self._host.peer),
            key=lambda p: (leases[p.peer].span.start if p.peer in leases else lineage.manifest.layers, p.peer),
        )
        return Glance(
            peer=self._host.peer,
            address=next(iter(self._host.addresses), ""),
            uptime=now - self._began,
            model=lineage.manifest.name,
            head=str(lineage.number(head)),
            coverage=coverage(tuple(leases.values()), lineage.manifest.layers, head),
            hosted=hosted,
            part=f"experts {describe(experts.experts)} of layers {experts.span}" if experts else "no layers",
            sessions=stats.sessions if stats else 0,
            sessions_total=stats.opened if stats else 0,
            failed=stats.failed if stats else 0,
            tokens=tokens,
            tokens_per_second=self._rate(now, tokens),
            round=state.round,
            phase=state.phase.value,
            phase_seconds=now - state.since,
            round_patches=len(state.patches),
            accepts=len({v.maintainer for v in state.votes if v.round == state.round and v.accept}),
            threshold=lineage.manifest.threshold,
            patches=tuple(self._patch(patch) for patch in mine[: -MOST_PATCHES - 1 : -1]),
            patch_count=len(mine),
            versions=tuple(self._version(version) for version in lineage.versions[: -MOST_VERSIONS - 1 : -1]),
            peers=tuple(
                PeerGlance(p.peer, p.roles, str(leases[p.peer].span) if p.peer in leases else "")
                for p in others[:MOST_PEERS]
            ),
            peer_count=len(others),
        )

    def _rate(self, now: float, tokens: int) -> float:
        self._tokens.append((now, tokens))
        while len(self._tokens) > 2 and now - self._tokens[1][0] >= RATE_SECONDS:
            self._tokens.popleft()
        since, before = self._tokens[0]
        return (tokens - before) / (now - since) if now > since else 0.0

    def _patch(self, patch: PatchId) -> PatchGlance:
        lineage = self._lineage
        merging = {
            version
            for version, candidate in list(lineage.candidates.items())
            if candidate.parent == lineage.head and patch in candidate.patches
        }
        verdicts = [verdict for verdict in list(lineage.verdicts.values()) if verdict.version in merging]
        accepts = len({v.maintainer for v in verdicts if v.accept})
        rejects = len({v.maintainer for v in verdicts if not v.accept})
        return PatchGlance(patch, state_of(lineage, patch), accepts, rejects)

    def _version(self, version: Version) -> VersionGlance:
        candidate = version.candidate
        what = f"{len(candidate.patches)} merged"
        if candidate.restores:
            what = "rollback"
        elif candidate.amends:
            what = "amendment"
        domains = [score for score in version.scores if "/" not in score.domain]
        loss = sum(score.candidate for score in domains) / len(domains) if domains else None
        before = sum(score.parent for score in domains) / len(domains) if domains else None
        return VersionGlance(str(candidate.number), version.id, what, loss, before)
