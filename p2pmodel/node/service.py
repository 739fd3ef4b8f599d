"""What a node answers to the commands on its machine (proto/p2pmodel/wire/v1/control.proto)."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from p2pmodel import __version__
from p2pmodel.domain.errors import NotFound
from p2pmodel.domain.experts import ExpertLease, rate_at
from p2pmodel.domain.ids import Digest, VersionId, short
from p2pmodel.domain.swarm import Lease, Presence
from p2pmodel.logic.experts import hosts_of
from p2pmodel.logic.routing import coverage
from p2pmodel.node.attendance import Attendance
from p2pmodel.node.community import Community
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.patches.patchbook import entries
from p2pmodel.node.watching.lookout import Lookout
from p2pmodel.node.watching.traffic import Traffic
from p2pmodel.store.home import Home
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost
from p2pmodel.wire.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from p2pmodel.node.hosting.hosting import Hosting


Ref = Callable[[VersionId], pb.VersionRef]


class Service:
    """Implements `control.server.ControlService`."""

    def __init__(
        self,
        home: Home,
        host: PeerHost,
        lineage: Lineage,
        directory: Directory,
        community: Community,
        attendance: Attendance,
        hosting: "Hosting | None",
        traffic: Traffic,
        maintains: bool,
        stop: Callable[[], None],
    ) -> None:
        self._home, self._host, self._lineage, self._directory = home, host, lineage, directory
        self._community, self._attendance, self._hosting = community, attendance, hosting
        self._traffic, self._maintains, self._stop = traffic, maintains, stop
        self._lookout = Lookout(self._read)
        self._began = time.monotonic()

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        leases, presences, experts = await self._lookout.look()
        lineage, head = self._lineage, self._lineage.served_head
        model = pb.ModelStatus(
            id=lineage.model,
            name=lineage.manifest.name,
            head=self._ref(head),
            layers=lineage.manifest.layers,
            round=self._round(),
            leases=[lease_status(lease, self._ref) for lease in sorted(leases, key=lambda x: x.span)],
            presences=[presence_status(presence) for presence in presences],
            coverage=coverage(leases, lineage.manifest.layers, head),
            maintains=self._maintains,
            expert_leases=[
                expert_lease_status(lease, self._ref) for lease in sorted(experts, key=lambda x: (x.span, x.experts))
            ],
            expert_hosts=hosts_of(experts, lineage.manifest.layers),
        )
        if self._hosting:
            model.hosted.CopyFrom(pb.Span(start=self._hosting.span.start, end=self._hosting.span.end))
            model.sessions, model.cached_tokens = self._hosting.stats.sessions, self._hosting.cached_tokens
        return pb.StatusReply(
            peer=self._host.peer,
            addresses=self._host.addresses,
            home=str(self._home.path),
            pid=os.getpid(),
            software=f"p2pmodel/{__version__}",
            uptime_seconds=time.monotonic() - self._began,
            models=[model],
            traffic=self._traffic.totals(),
        )

    async def versions(self, request: pb.ListVersionsRequest) -> pb.ListVersionsReply:
        found = [
            pb.VersionInfo(
                version=self._ref(version.id),
                parent=self._ref(version.candidate.parent),
                round=version.candidate.round,
                strategy=version.candidate.merge.strategy,
                alpha=version.candidate.alpha,
                patches=version.candidate.patches,
                left_out=[left.patch for left in version.candidate.left_out],
                accepted_by=[verdict.maintainer for verdict in version.verdicts],
            )
            for version in self._lineage.versions
        ]
        return pb.ListVersionsReply(model=self._lineage.model, versions=found)

    async def patches(self, request: pb.ListPatchesRequest) -> pb.ListPatchesReply:
        found = [
            pb.PatchInfo(
                id=entry.id,
                contributor=entry.patch.contributor,
                parent=self._ref(entry.patch.parent),
                kind=entry.patch.kind,
                state=entry.state,
                bytes=entry.patch.adapter.size,
                samples=entry.patch.samples,
                licence=entry.patch.licence,
            )
            for entry in entries(self._lineage)
        ]
        return pb.ListPatchesReply(model=self._lineage.model, patches=found)

    async def publish(self, request: pb.PublishRequest) -> pb.PublishReply:
        self._lineage.refresh()
        patch = Digest(request.record)
        kinds = {record.digest: kind for kind, record in self._lineage.inventory()}
        if kinds.get(patch) in ("candidate", "verdict"):
            await self._community.publish(kinds[patch], patch)
            return pb.PublishReply(patch=patch, model=self._lineage.model, round=self._community.round.round)
        if patch not in self._lineage.patches:
            raise NotFound(
                f"Patch {short(patch)} of {self._lineage.manifest.name} is not in this home.",
                "Publish its file: p2pmodel patch publish",
            )
        await self._community.publish("patch", patch)
        return pb.PublishReply(patch=patch, model=self._lineage.model, round=self._community.round.round)

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        self._stop()
        return pb.StopReply()

    async def _read(self) -> tuple[Sequence[Lease], Sequence[Presence], Sequence[ExpertLease]]:
        return await asyncio.gather(
            self._directory.leases(), self._directory.presences(), self._directory.expert_leases()
        )

    def _ref(self, version: VersionId) -> pb.VersionRef:
        """A lease may name a version that this node has not heard of yet; it has no number here."""
        try:
            return pb.VersionRef(id=version, number=str(self._lineage.number(version)))
        except NotFound:
            return pb.VersionRef(id=version)

    def _round(self) -> pb.RoundStatus:
        state, rules = self._community.round, self._lineage.manifest
        accepts = {v.maintainer for v in state.votes if v.round == state.round and v.accept}
        return pb.RoundStatus(
            number=state.round,
            phase=state.phase.value,
            patches=len(state.patches),
            since_seconds=time.monotonic() - state.since,
            accepts=len(accepts),
            threshold=rules.threshold,
            examined=self._community.examined,
        )


def expert_lease_status(lease: ExpertLease, ref: Ref) -> pb.ExpertLeaseStatus:
    return pb.ExpertLeaseStatus(
        peer=lease.peer,
        span=pb.Span(start=lease.span.start, end=lease.span.end),
        experts=lease.experts,
        versions=[ref(v) for v in lease.versions],
        dtype=lease.dtype,
        queue=lease.queue,
        pair_seconds=lease.pair_seconds,
        rows_per_second=[rate_at(load) for load in lease.loads],
        coming=lease.coming,
        going=lease.going,
        expires_in_seconds=lease.expires - time.time(),
    )


def lease_status(lease: Lease, ref: Ref) -> pb.LeaseStatus:
    return pb.LeaseStatus(
        peer=lease.peer,
        span=pb.Span(start=lease.span.start, end=lease.span.end),
        versions=[ref(v) for v in lease.versions],
        dtype=lease.dtype,
        queue=lease.queue,
        layer_seconds=lease.layer_seconds,
        expires_in_seconds=lease.expires - time.time(),
    )


def presence_status(presence: Presence) -> pb.PresenceStatus:
    return pb.PresenceStatus(
        peer=presence.peer, roles=presence.roles, software=presence.software, addresses=presence.addresses
    )
