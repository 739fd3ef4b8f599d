"""The signed records of a lineage, each with its size limit and the rule that its author is who its body says.

The digest of a record's bytes is its address in every store; of a manifest's it is the model id, of a patch's the patch
id. A version's id is the digest of the candidate's body, so that two proposers of the same candidate propose one
version.
"""

from p2pmodel.domain.announcement import MAX_ANNOUNCEMENT_BYTES, Announcement
from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.domain.model import Manifest
from p2pmodel.domain.modular import check_pools
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.swarm import Lease, Presence
from p2pmodel.domain.version import Candidate, Verdict
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Signed, open_record

MAX_MANIFEST_BYTES = 32 << 20
MAX_PATCH_HEADER_BYTES = 1 << 20
MAX_CANDIDATE_BYTES = 1 << 20
MAX_VERDICT_BYTES = 64 << 10
MAX_DHT_BYTES = 8 << 10


def record_kind(record: bytes, limit: int) -> str:
    """The kind that a record claims to be, unverified. Raises Rejected when it is no record at all."""
    return canonical.decode(record, Signed, limit).kind


def open_manifest(record: bytes) -> tuple[Manifest, PeerId]:
    manifest, signer = open_record(record, "manifest", Manifest, MAX_MANIFEST_BYTES)
    try:
        check_pools(manifest.slots)
    except ValueError as error:
        raise Rejected("schema", f"These bytes are no valid Manifest: {error}.") from None
    return manifest, signer


def open_patch(record: bytes, limit: int = MAX_PATCH_HEADER_BYTES) -> Patch:
    patch, signer = open_record(record, "patch", Patch, limit)
    _demand(signer, patch.contributor, "patch")
    return patch


def open_candidate(record: bytes) -> tuple[Candidate, PeerId, VersionId]:
    """The candidate, its proposer, and the version id that it would become."""
    candidate, signer = open_record(record, "candidate", Candidate, MAX_CANDIDATE_BYTES)
    return candidate, signer, version_id(candidate)


def open_verdict(record: bytes) -> Verdict:
    verdict, signer = open_record(record, "verdict", Verdict, MAX_VERDICT_BYTES)
    _demand(signer, verdict.maintainer, "verdict")
    return verdict


def open_lease(record: bytes) -> Lease:
    lease, signer = open_record(record, "lease", Lease, MAX_DHT_BYTES)
    _demand(signer, lease.peer, "lease")
    return lease


def open_expert_lease(record: bytes) -> ExpertLease:
    lease, signer = open_record(record, "experts", ExpertLease, MAX_DHT_BYTES)
    _demand(signer, lease.peer, "expert lease")
    return lease


def open_presence(record: bytes) -> Presence:
    presence, signer = open_record(record, "presence", Presence, MAX_DHT_BYTES)
    _demand(signer, presence.peer, "presence")
    return presence


def open_announcement(record: bytes) -> Announcement:
    announcement, signer = open_record(record, "announcement", Announcement, MAX_ANNOUNCEMENT_BYTES)
    _demand(signer, announcement.holder, "announcement")
    return announcement


def version_id(candidate: Candidate) -> VersionId:
    return canonical.digest(canonical.encode(candidate))


def _demand(signer: PeerId, owner: PeerId, kind: str) -> None:
    if signer != owner:
        raise Rejected("owner", f"This {kind} speaks for {owner}, but {signer} signed it.")
