"""What a record has to satisfy, besides its signature and schema, before it is kept and passed on.

`Rejected.reason` is one word: model, parent, kind, size, duplicate, proposer, round, number, experts, merge, patches,
amendment, maintainer, scores. What is inside the tensors (slots, shapes, finiteness) is checked where they are
unpacked.
"""

from collections.abc import Collection
from math import prod

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import Digest, ModelId, PeerId, VersionId, short
from p2pmodel.domain.model import Amendment, Manifest
from p2pmodel.domain.modular import Experts, is_pool, max_rank, slots_at
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.version import Candidate, Verdict, VersionNumber

MAX_FAILED_ROUNDS = 1 << 20
"""How far a candidate's round may be ahead of its parent's: far above what nodes climb to (`turns.FOLLOWED`)."""

MAX_EXAM_BYTES = 1 << 30
"""Of another exam that an amendment brings: everybody fetches it."""

_BYTES_EACH = 8  # the widest dtype of a slot
_OVERHEAD_EACH = 4096  # a slot's entry in the header of a safetensors file


def check_patch(
    patch: Patch,
    manifest: Manifest,
    head: VersionId,
    known_parents: Collection[VersionId],
    *,
    model: ModelId,
    contributors: Collection[PeerId] = (),
) -> None:
    """Whether `patch` may take part in the round on `head`. Raises Rejected.

    manifest: in force for what follows `head`; known_parents: the versions of the lineage, to tell a stale patch from
    one of a version never heard of, which may bring other limits; contributors: those with another patch in this round
    already: a contributor's first one stands. Leave it empty for a patch that a candidate names, because its proposer
    may have met another one first.
    """
    if patch.model != model:
        raise Rejected("model", f"The patch is for model {short(patch.model)}, not {short(model)}.")
    if patch.kind not in manifest.kinds:
        raise Rejected(
            "kind",
            f"{manifest.name} takes no patches of kind {patch.kind[:32]!r}.",
            f"It takes {', '.join(manifest.kinds)}.",
        )
    if patch.parent != head:
        known = patch.parent in known_parents
        what = f"was trained on {short(patch.parent)}, " + ("an older version" if known else "a version not known here")
        raise Rejected(
            "parent", f"The patch {what}; the head is {short(head)}.", "Train again on the head." if known else ""
        )
    size = sum(ref.size for ref in patch.blobs)
    if size > manifest.limits.max_patch_bytes or not patch.adapter.size:
        raise Rejected(
            "size", f"The patch has {size} bytes; {manifest.name} takes 1 to {manifest.limits.max_patch_bytes}."
        )
    if patch.contributor in contributors:
        raise Rejected(
            "duplicate",
            f"{patch.contributor} has a patch in this round already.",
            "The next one can be proposed in the next round.",
        )
    if len(contributors) >= manifest.schedule.max_patches:
        raise Rejected(
            "patches",
            f"This round has {len(contributors)} patches already, as many as {manifest.name} takes.",
            "The next one can be proposed in the next round.",
        )


def check_candidate(
    candidate: Candidate,
    manifest: Manifest,
    *,
    model: ModelId,
    proposer: PeerId,
    parent_number: VersionNumber,
    parent_round: int,
    restorable: Collection[Digest] = (),
    parent_experts: Experts = (),
) -> None:
    """Whether `candidate` may follow a parent with that number, adopted in that round, 0 for the base. manifest: in
    force at the parent. restorable: the values that one may have which restores an older version, or amends the
    Manifest. parent_experts: those that the parent has. Raises Rejected."""
    if candidate.model != model:
        raise Rejected("model", f"The candidate is for model {short(candidate.model)}, not {short(model)}.")
    if proposer not in manifest.maintainers:
        raise Rejected("proposer", f"{proposer} proposes a version, and is no maintainer of {manifest.name}.")
    if not parent_round < candidate.round <= parent_round + MAX_FAILED_ROUNDS:
        raise Rejected("round", f"The candidate is of round {candidate.round}, and its parent of {parent_round}.")
    if flaw := candidate.misfit(parent_number, parent_experts):
        raise Rejected("number", f"The candidate {flaw}.")
    _check_experts(candidate.experts, manifest)
    if candidate.amendment is not None:
        _check_amendment(candidate.amendment, manifest)
        if candidate.result.digest not in restorable:
            raise Rejected("merge", "The candidate amends the Manifest, and has other values than its parent.")
    elif candidate.restores:
        if candidate.result.digest not in restorable:
            raise Rejected("merge", "The candidate restores values that no older version of its chain has.")
    elif not candidate.removes and candidate.merge != manifest.merge:
        raise Rejected(
            "merge",
            f"The candidate is merged by {candidate.merge.strategy[:32]!r} or with parameters that "
            f"are not those of {manifest.name}.",
        )
    left_out = [entry.patch for entry in candidate.left_out]
    settled = [*candidate.patches, *left_out]
    if len(settled) > manifest.schedule.max_patches or len(set(settled)) != len(settled):
        raise Rejected("patches", "The candidate names a patch twice, or more patches than a round may have.")
    room = result_limit(manifest, candidate.experts)
    for ref in candidate.blobs:
        if not 0 < ref.size <= room:
            raise Rejected("size", f"The candidate's result has {ref.size} bytes; the slots need {room}.")


def _check_experts(experts: Experts, manifest: Manifest) -> None:
    """Their ranks say how large the values are that everybody fetches."""
    highest = min((max_rank(slot) for slot in manifest.slots if is_pool(slot)), default=0)
    for expert in experts:
        if not highest:
            raise Rejected("experts", f"The candidate has experts, and {manifest.name} has no pools for any.")
        if expert.rank > highest:
            raise Rejected(
                "experts",
                f"The candidate's expert {expert.name} has rank {expert.rank}; {manifest.name} takes 1 to {highest}.",
            )


def _check_amendment(amendment: Amendment, manifest: Manifest) -> None:
    if amendment == manifest.amendment:
        raise Rejected("amendment", "The candidate amends the Manifest by what it says already.")
    if amendment.exam != manifest.exam and not 0 < amendment.exam.size <= MAX_EXAM_BYTES:
        raise Rejected("size", f"The amendment's exam has {amendment.exam.size} bytes; {MAX_EXAM_BYTES} may be.")


def result_limit(manifest: Manifest, experts: Experts = ()) -> int:
    """The most bytes that the values of all slots of a version with these experts may take."""
    slots = slots_at(manifest.slots, experts)
    return sum(prod(slot.shape) * _BYTES_EACH + _OVERHEAD_EACH for slot in slots) + _OVERHEAD_EACH


def check_verdict(
    verdict: Verdict,
    manifest: Manifest,
    *,
    model: ModelId,
    candidate: Candidate | None,
    entitled: Collection[PeerId] = (),
) -> None:
    """Whether `verdict` counts at all. candidate: what it is on, when that is here; entitled: who is a maintainer in
    other parts of the lineage, or would be by a candidate. Raises Rejected; "parent" when the candidate may still show
    that its author is entitled."""
    if verdict.model != model:
        raise Rejected("model", f"The verdict is for model {short(verdict.model)}, not {short(model)}.")
    if verdict.maintainer not in manifest.maintainers and verdict.maintainer not in entitled:
        if candidate is None:
            raise Rejected("parent", f"{verdict.maintainer} is no maintainer by what is known here of the model.")
        raise Rejected("maintainer", f"{verdict.maintainer} gives a verdict, and is no maintainer of {manifest.name}.")
    if candidate is not None and verdict.round != candidate.round:
        raise Rejected(
            "round", f"The verdict is for round {verdict.round}, and its candidate is of round {candidate.round}."
        )
    if len({score.domain for score in verdict.scores}) != len(verdict.scores):
        raise Rejected("scores", "The verdict scores a domain of the exam twice.")
