"""What a lineage lets in: every record is opened, admitted, and its tensors checked, before it is stored."""

import time
from collections.abc import Sequence

from p2pmodel.domain.errors import NotFound, Rejected, StorageError
from p2pmodel.domain.ids import Digest, PatchId, PeerId, short
from p2pmodel.domain.model import BlobRef, Manifest
from p2pmodel.domain.modular import Experts, slots_at
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.version import BASE_NUMBER, Candidate, Verdict
from p2pmodel.logic import admission
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import base_ref, new_experts, read_change, read_masses
from p2pmodel.store.index import RecordRow
from p2pmodel.tensors import blob, control, variates
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.wire import bundle, canonical, records
from p2pmodel.wire.bundle import OpenBundle
from p2pmodel.wire.signing import RECORD_OVERHEAD


def record_limit(lineage: Lineage, kind: str) -> int:
    """The most bytes that a record of the kind may have."""
    body = {
        "patch": lineage.largest_header,
        "candidate": records.MAX_CANDIDATE_BYTES,
        "verdict": records.MAX_VERDICT_BYTES,
    }[kind]
    return body + RECORD_OVERHEAD


def needed_blobs(lineage: Lineage, kind: str, record: bytes) -> tuple[BlobRef, ...]:
    """Admits the record on its own, and names the blobs that have to be here before it is stored. Raises Rejected;
    with the reason "parent" it may be admitted later, when what it stands on has come."""
    if kind == "patch":
        patch = records.open_patch(record, lineage.largest_header)
        _admit_patch(lineage, canonical.digest(record), patch)
        return patch.blobs
    if kind == "candidate":
        candidate, proposer, _ = records.open_candidate(record)
        _admit_candidate(lineage, candidate, proposer)
        return lineage.blobs_of(candidate)
    verdict = records.open_verdict(record)
    on = lineage.candidates.get(verdict.version)
    admission.check_verdict(verdict, lineage.manifest, model=lineage.model, candidate=on, entitled=lineage.entitled)
    return ()


def named_patches(record: bytes) -> tuple[PatchId, ...]:
    """Those that a candidate's record takes in or leaves out."""
    candidate, _, _ = records.open_candidate(record)
    return (*candidate.patches, *(entry.patch for entry in candidate.left_out))


def is_of_kind(lineage: Lineage, kind: str, digest: Digest) -> bool:
    """Whether the object is a record that says of itself that it is of the kind."""
    try:
        limit = record_limit(lineage, kind)
        return records.record_kind(lineage.home.objects.load(digest, limit), limit) == kind
    except (Rejected, NotFound, StorageError):
        return False


def _admit_patch(lineage: Lineage, patch_id: PatchId, patch: Patch) -> None:
    """A patch on the head takes part in its round; one on an older version belongs to the history, and is admitted by
    what was in force then. The first patch of a contributor on a parent stands, unless a maintainer's candidate names
    another."""
    parents = {lineage.model, *(v.id for v in lineage.versions)}
    named = any(
        patch_id in c.patches or any(x.patch == patch_id for x in c.left_out) for c in lineage.candidates.values()
    )
    others = (
        set()
        if named
        else {p.contributor for i, p in lineage.patches.items() if p.parent == patch.parent and i != patch_id}
    )
    known = patch.parent in parents
    manifest = lineage.manifest_at(patch.parent) if known else lineage.manifest
    head = patch.parent if known else lineage.head
    admission.check_patch(patch, manifest, head, parents, model=lineage.model, contributors=others)


def _admit_candidate(lineage: Lineage, candidate: Candidate, proposer: PeerId) -> None:
    parent = lineage.candidates.get(candidate.parent)
    if parent is None and candidate.parent != lineage.model:
        raise Rejected("parent", f"The candidate's parent {short(candidate.parent)} is not known here.")
    restorable = set()
    if candidate.amends:
        restorable = {parent.result.digest if parent else base_ref(lineage.founding).digest}
    elif candidate.restores:
        restorable = _restorable(lineage, candidate)
    admission.check_candidate(
        candidate,
        lineage.manifest_at(candidate.parent),
        model=lineage.model,
        proposer=proposer,
        parent_number=parent.number if parent else BASE_NUMBER,
        parent_round=parent.round if parent else 0,
        restorable=restorable,
        parent_experts=parent.experts if parent else (),
    )


def _restorable(lineage: Lineage, candidate: Candidate) -> set[Digest]:
    """The values of the versions before the candidate's parent, and of the base."""
    chain = lineage.chain(candidate.parent)
    found = {base_ref(lineage.founding).digest, *(older.result.digest for older in chain)}
    return found - {chain[-1].result.digest} if chain else set()


def store(lineage: Lineage, kind: str, record: bytes, refs: Sequence[BlobRef]) -> BlobRef:
    """Checks the tensors of an admitted record and stores it; its blobs, `needed_blobs`, have to be here.

    May run on any thread: the lineage sees the record when it is refreshed. Raises Rejected.
    """
    objects, manifest = lineage.home.objects, lineage.manifest
    candidate = records.open_candidate(record)[0] if kind == "candidate" else None
    experts = candidate.experts if candidate else ()
    limit = lineage.largest_patch if kind == "patch" else admission.result_limit(manifest, experts)
    tensors = candidate.blobs if candidate else refs
    blobs = [objects.load(ref.digest, limit) for ref in tensors]
    if kind == "patch":
        check_tensors(lineage, records.open_patch(record, lineage.largest_header), *blobs)
    elif kind == "candidate":
        check_values(manifest, blobs[0], experts)
        for raw in blobs[1:]:
            variates.read_mean(raw, manifest.kinds, manifest.slots, limit)
    stored = objects.put(record)
    lineage.home.index.add(RecordRow(kind, lineage.model, stored, _round(kind, record), time.time()))
    return stored


def sign_and_store(lineage: Lineage, kind: str, noun: Candidate | Verdict) -> Digest:
    """Of this home's own making. -> its record, to be announced. Raises Rejected."""
    record = lineage.home.key.sign(kind, noun)
    stored = store(lineage, kind, record, needed_blobs(lineage, kind, record))
    lineage.refresh()
    return stored.digest


def take_in(lineage: Lineage, raw: bytes) -> BlobRef:
    """Checks a patch file as every peer will, and stores it; publishing is the node's. Raises Rejected."""
    opened = bundle.open_bundle(raw)
    refs = needed_blobs(lineage, "patch", opened.raw.header)
    if opened.patch.parent != lineage.head:
        raise Rejected(
            "parent",
            "The patch was trained on another version than the head, and can't be merged any more.",
            "Move it with: p2pmodel rebase PATCH --onto head; or train it again.",
        )
    objects = lineage.home.objects
    new = [ref.digest for ref in refs if not objects.has(ref.digest)]
    for raw_blob in opened.raw.blobs:
        objects.put(raw_blob)
    try:
        return store(lineage, "patch", opened.raw.header, refs)
    except Rejected:
        for digest in new:
            objects.remove(digest)
        raise


def check_values(manifest: Manifest, raw: bytes, experts: Experts = ()) -> None:
    """A blob of the values of all slots of a version with these experts. Raises Rejected."""
    slots = slots_at(manifest.slots, experts)
    if len(blob.unpack(raw, slots, admission.result_limit(manifest, experts))) != len(slots):
        raise Rejected("shape", "The version does not give a value for every slot of the model.")


def check_tensors(
    lineage: Lineage, patch: Patch, adapter: bytes, fisher: bytes, control_variate: bytes | None = None
) -> None:
    """A patch's blobs against the Manifest. Raises Rejected."""
    if control_variate is not None and not get_kind(patch.kind).continued:
        raise Rejected("schema", f"Patches of kind {patch.kind} have no control variate, but this one has.")
    change = read_change(lineage, patch.kind, adapter)
    new_experts(lineage, patch, change)
    read_masses(lineage, patch.kind, change, fisher)
    if control_variate is not None:
        limit = lineage.largest_patch
        control.read(control_variate, control.places(adapter, change, limit), limit)


def check_patch_file(lineage: Lineage, opened: OpenBundle) -> None:
    """All that a peer checks of a patch, on a patch file. Raises Rejected."""
    needed_blobs(lineage, "patch", opened.raw.header)
    check_tensors(lineage, opened.patch, *opened.raw.blobs)


def check_stored_patch(lineage: Lineage, patch: PatchId) -> None:
    """The same on a patch in the store. Raises Rejected."""
    record = lineage.home.objects.load(patch)
    blobs = [lineage.home.objects.load(ref.digest) for ref in needed_blobs(lineage, "patch", record)]
    check_tensors(lineage, records.open_patch(record, lineage.largest_header), *blobs)


def _round(kind: str, record: bytes) -> int:
    if kind == "candidate":
        return records.open_candidate(record)[0].round
    return records.open_verdict(record).round if kind == "verdict" else 0
