"""What the status page shows, as JSON can hold it: the model, who serves it, the round, the versions.

Times are Unix seconds, so that a status stays the same until something happens. Names that peers chose are among the
values: whoever shows them has to treat them as text.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from p2pmodel import __version__
from p2pmodel.domain.errors import NotFound
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.swarm import Lease, Presence
from p2pmodel.domain.version import Candidate, Verdict, Version
from p2pmodel.logic.round_state import RoundState
from p2pmodel.logic.routing import coverage
from p2pmodel.node.community import Community
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.watching.expert_view import ExpertView
from p2pmodel.node.watching.lookout import Lookout, Sighting, unexpired
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost

if TYPE_CHECKING:
    from p2pmodel.node.hosting.hosting import Hosting

MOST_VERSIONS = 200
MOST_LISTED = 500


class Overview:
    """Of one lineage, as this process knows it."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage

    def view(self, leases: Sequence[Lease], presences: Sequence[Presence]) -> dict[str, Any]:
        manifest = self._lineage.manifest
        live = [lease for lease in unexpired(leases) if not lease.leaving]
        present = unexpired(presences)
        served = self._served_head(live)
        return {
            "software": f"p2pmodel/{__version__}",
            "model": {
                "id": self._lineage.model,
                "name": manifest.name,
                "architecture": manifest.architecture,
                "licence": manifest.licence,
                "layers": manifest.layers,
                "maintainers": list(manifest.maintainers),
                "threshold": manifest.threshold,
                "head": self.named(self._lineage.head),
                "served": self.named(served),
            },
            "coverage": list(coverage(live, manifest.layers, served)),
            "leases": [self._lease(lease) for lease in sorted(live, key=lambda x: (x.span, x.peer))[:MOST_LISTED]],
            "peers": [{"peer": p.peer, "roles": list(p.roles), "software": p.software} for p in present[:MOST_LISTED]],
            "join": next((f"p2pmodel join --peers {a}" for p in present for a in p.addresses), ""),
            "versions": [self._version(version) for version in self._lineage.versions[-MOST_VERSIONS:]],
        }

    def round(self, state: RoundState) -> dict[str, Any]:
        """The round that a node takes part in."""
        lineage, began = self._lineage, time.time() - time.monotonic() + state.since
        seen = [p.version for p in state.candidates if p.version in lineage.candidates]
        schedule = lineage.manifest.schedule
        return {
            "number": state.round,
            "phase": state.phase.value,
            "since": round(began),
            "threshold": lineage.manifest.threshold,
            "wanted": schedule.min_patches,
            "open_seconds": schedule.open_seconds,
            "patches": [self._patch(patch) for patch in state.patches[:MOST_LISTED]],
            "candidates": [self._candidate(version, lineage.candidates[version], state.round) for version in seen],
        }

    def _served_head(self, leases: Sequence[Lease]) -> VersionId:
        """The newest version that all layers are served at, or else the newest."""
        known = [*(version.id for version in reversed(self._lineage.versions)), VersionId(self._lineage.model)]
        layers = self._lineage.manifest.layers
        return next((version for version in known if all(coverage(leases, layers, version))), known[0])

    def _lease(self, lease: Lease) -> dict[str, Any]:
        return {
            "peer": lease.peer,
            "start": lease.span.start,
            "end": lease.span.end,
            "versions": [self.named(version) for version in sorted(lease.versions, key=self._age)],
            "dtype": lease.dtype,
            "layer_seconds": lease.layer_seconds,
            "queue": lease.queue,
            "moving": [lease.moving.start, lease.moving.end] if lease.moving else None,
        }

    def _age(self, version: VersionId) -> int:
        """Oldest first; what is not known here is newer."""
        known = [VersionId(self._lineage.model), *(version.id for version in self._lineage.versions)]
        return known.index(version) if version in known else len(known)

    def named(self, version: VersionId) -> dict[str, str]:
        """A lease may name a version that has not been heard of here; it has no number."""
        try:
            return {"id": version, "number": str(self._lineage.number(version))}
        except NotFound:
            return {"id": version, "number": ""}

    def _patch(self, patch: PatchId) -> dict[str, Any]:
        known = self._lineage.patches.get(patch)
        if known is None:
            return {"id": patch}
        return {
            "id": patch,
            "contributor": known.contributor,
            "kind": known.kind,
            "samples": known.samples,
            "licence": known.licence,
            "claimed": [known.loss_before, known.loss_after],
        }

    def _candidate(self, version: VersionId, candidate: Candidate, number: int) -> dict[str, Any]:
        verdicts = [v for v in self._lineage.verdicts.values() if v.version == version and v.round == number]
        return {
            "id": version,
            "number": str(candidate.number),
            "proposer": self._lineage.proposers[version][0],
            "patches": list(candidate.patches),
            "left_out": [asdict(left) for left in candidate.left_out],
            "verdicts": [_verdict(verdict) for verdict in verdicts],
        }

    def _version(self, version: Version) -> dict[str, Any]:
        candidate = version.candidate
        return {
            "id": version.id,
            "number": str(candidate.number),
            "round": candidate.round,
            "strategy": candidate.merge.strategy,
            "alpha": candidate.alpha,
            "patches": [self._patch(patch) for patch in candidate.patches],
            "left_out": [asdict(left) for left in candidate.left_out],
            "verdicts": [_verdict(verdict) for verdict in version.verdicts],
            "scores": [asdict(score) for score in version.scores],
        }


class NodeView:
    """A node's own status page."""

    def __init__(
        self, host: PeerHost, lineage: Lineage, directory: Directory, community: Community, hosting: "Hosting | None"
    ) -> None:
        self._host, self._directory, self._community, self._hosting = host, directory, community, hosting
        self._lookout = Lookout(self._read)
        self._overview = Overview(lineage)
        self._experts = ExpertView(lineage, directory.expert_leases, self._overview.named)
        self._began = round(time.time())

    async def status(self) -> dict[str, Any]:
        """Implements `gateway.ports.StatusSource`. Raises Unreachable."""
        (leases, presences), experts = await asyncio.gather(self._lookout.look(), self._experts.view())
        hosting = self._hosting
        return self._overview.view(leases, presences) | {
            "here": {
                "peer": self._host.peer,
                "began": self._began,
                "sessions": hosting.stats.sessions if hosting else 0,
                "tokens": hosting.stats.tokens if hosting else 0,
            },
            "round": self._overview.round(self._community.round),
            "experts": experts,
            "chat": False,
            "requests": None,
            "join": next((f"p2pmodel join --peers {address}" for address in self._host.addresses), ""),
        }

    async def _read(self) -> Sighting:
        return await asyncio.gather(self._directory.leases(), self._directory.presences())


def requests_view(at_work: int, waiting: int, answered: int) -> dict[str, int]:
    """What a gateway is doing."""
    return {"at_work": at_work, "waiting": waiting, "answered": answered}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {"maintainer": verdict.maintainer, "accept": verdict.accept, "reason": verdict.reason}
