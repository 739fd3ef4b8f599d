"""What people decide in a lineage: to amend its Manifest, and what becomes of a candidate.

An amendment is a candidate that merges nothing, `amend@1`: a version of its own with its parent's values, in the same
chain, adopted by the maintainers of before, and by those of after where these are others (`logic.quorum.electorates`).
No exam has an opinion on it, so each maintainer's node signs only what its maintainer has approved.
"""

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected, UsageError
from p2pmodel.domain.ids import Digest, VersionId, short
from p2pmodel.domain.model import Amendment
from p2pmodel.domain.version import AMEND, Candidate, Verdict
from p2pmodel.logic import turns
from p2pmodel.node.lineages.intake import needed_blobs, store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.versions.checkout import state_bytes
from p2pmodel.wire import records

MAX_REASON = 256


def propose(lineage: Lineage, amendment: Amendment) -> tuple[Digest, VersionId]:
    """Signs and stores the candidate on the head, approved by this home; the node then announces it. -> its record, and
    the id of the version that it would become. Raises Rejected, UsageError when it changes nothing."""
    if lineage.home.key.peer not in lineage.manifest.maintainers:
        raise Rejected(
            "maintainer",
            f"This home's key is none of the maintainers of {lineage.manifest.name}, who may amend its Manifest.",
            "Ask one of them; see p2pmodel model show",
        )
    if amendment == lineage.manifest.amendment:
        raise UsageError(
            f"The Manifest of {lineage.manifest.name} says all of this already.", "Name what is to change."
        )
    result = lineage.home.objects.put(state_bytes(lineage, lineage.head))
    candidate = Candidate(
        model=lineage.model,
        round=next_round(lineage),
        parent=lineage.head,
        number=lineage.number(lineage.head).next_patch(),
        patches=(),
        left_out=(),
        merge=AMEND,
        alpha=0.0,
        result=result,
        amendment=amendment,
        experts=lineage.experts(lineage.head),
    )
    record = lineage.home.key.sign("candidate", candidate)
    stored = store(lineage, "candidate", record, needed_blobs(lineage, "candidate", record))
    lineage.refresh()
    version = records.version_id(candidate)
    lineage.decide(version, accept=True)
    return stored.digest, version


def next_round(lineage: Lineage) -> int:
    """After all that this home's maintainer has signed in, and that candidates on the head are of, but for such as name
    a round far ahead."""
    last = lineage.versions[-1].candidate.round if lineage.versions else 0
    mine = [verdict.round for verdict in lineage.verdicts.values() if verdict.maintainer == lineage.home.key.peer]
    known = [candidate.round for candidate in lineage.candidates.values() if candidate.parent == lineage.head]
    return turns.next_round(max([last, *mine]), known)


def find_candidate(lineage: Lineage, text: str) -> VersionId:
    """On the head, by its id or the beginning of one. Raises NotFound."""
    waiting = [v for v, candidate in lineage.candidates.items() if candidate.parent == lineage.head]
    found = [version for version in waiting if len(text) >= 4 and version.startswith(text)]
    if len(found) != 1:
        raise NotFound(
            f"{text[:64]!r} is no candidate on the head of {lineage.manifest.name}.", "See: p2pmodel round show"
        )
    return found[0]


def decide(lineage: Lineage, version: VersionId, accept: bool, reason: str) -> Digest | None:
    """What the person of this home says of a candidate on the head. A maintainer's node signs it; where an amendment
    makes this home's key a maintainer, the verdict is signed here: -> its record, to be announced. Raises Rejected,
    InvalidInput."""
    me, candidate = lineage.home.key.peer, lineage.candidates[version]
    if len(reason) > MAX_REASON or (not accept and not reason):
        raise InvalidInput(f"A reason has 1 to {MAX_REASON} characters.", "Give one with --reason.")
    mine = [v for v in lineage.verdicts.values() if v.maintainer == me and v.round == candidate.round]
    if any(v.version == version or (accept and v.accept) for v in mine):
        raise Rejected("round", f"This home has signed a verdict in round {candidate.round} already.")
    if me in lineage.manifest.maintainers:
        if accept and candidate.restores:
            lineage.agree_to_rollback(lineage.restored_by(candidate))
        lineage.decide(version, accept, reason)
        return None
    if candidate.amendment is None or me not in candidate.amendment.maintainers:
        raise Rejected(
            "maintainer",
            f"This home's key is none of those that decide on version {short(version)} of {lineage.manifest.name}.",
            "See: p2pmodel round show",
        )
    verdict = Verdict(me, lineage.model, candidate.round, version, accept, reason, ())
    record = lineage.home.key.sign("verdict", verdict)
    stored = store(lineage, "verdict", record, needed_blobs(lineage, "verdict", record))
    lineage.refresh()
    return stored.digest
