"""What the person of a home says of a candidate."""

import time

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import Digest, VersionId, abbreviates, short
from p2pmodel.domain.version import MAX_REASON, Verdict
from p2pmodel.logic.quorum import tally
from p2pmodel.node.lineages.intake import sign_and_store
from p2pmodel.node.lineages.lineage import Lineage


def find_candidate(lineage: Lineage, text: str) -> VersionId:
    """On the head, by its id or the beginning of one. Raises NotFound."""
    waiting = [v for v, candidate in lineage.candidates.items() if candidate.parent == lineage.head]
    found = [version for version in waiting if abbreviates(text, version)]
    if len(found) != 1:
        raise NotFound(
            f"{text[:64]!r} is no candidate on the head of {lineage.manifest.name}.", "See: p2pmodel round show"
        )
    return found[0]


def decide(lineage: Lineage, version: VersionId, accept: bool, reason: str) -> Digest | None:
    """Of a candidate on the head. A maintainer's node signs it; where an amendment makes this home's key a maintainer,
    the verdict is signed here: -> its record, to be announced. Raises Rejected, InvalidInput."""
    me, candidate = lineage.home.key.peer, lineage.candidates[version]
    if len(reason) > MAX_REASON or (not accept and not reason):
        raise InvalidInput(f"A reason has 1 to {MAX_REASON} characters.", "Give one with --reason.")
    mine = [v for v in lineage.verdicts.values() if v.maintainer == me and v.round == candidate.round]
    if any(v.version == version or (accept and v.accept) for v in mine):
        raise Rejected("round", f"This home has signed a verdict in round {candidate.round} already.")
    if me in lineage.manifest.maintainers:
        if time.time() >= closing(lineage, version):
            over = f"The time to decide on version {short(version)} is over."
            raise Rejected("round", over, "Its proposer can propose it again.")
        if accept:
            demand_free(lineage, version)
        if accept and candidate.restores:
            lineage.notes.agree_to_rollback(lineage.head, lineage.restored_by(candidate))
        lineage.notes.decide(version, accept, reason)
        return None
    if candidate.amendment is None or me not in candidate.amendment.maintainers:
        raise Rejected(
            "maintainer",
            f"This home's key is none of those that decide on version {short(version)} of {lineage.manifest.name}.",
            "See: p2pmodel round show",
        )
    return sign_and_store(lineage, "verdict", Verdict(me, lineage.model, candidate.round, version, accept, reason, ()))


def closing(lineage: Lineage, version: VersionId) -> float:
    """Until when the verdict of this home's maintainer on a candidate can be signed (`logic.signing`), in seconds since
    the epoch."""
    return lineage.heard[version] + lineage.manifest.schedule.verdict_seconds


def demand_free(lineage: Lineage, version: VersionId | None = None) -> None:
    """Raises Rejected where this home's maintainer has accepted another aside on the head than `version` that may still
    be adopted: its node signs nothing beside that."""
    manifest, me = lineage.manifest, lineage.home.key.peer
    votes = list(lineage.verdicts.values())
    for other, candidate in lineage.candidates.items():
        if other == version or candidate.parent != lineage.head or not candidate.aside:
            continue
        signed = any(v.maintainer == me and v.version == other and v.accept for v in votes)
        over = closing(lineage, other) + (manifest.schedule.proposer_seconds if signed else 0)
        against = len(tally(other, candidate.round, votes, manifest.maintainers).rejects)
        accepted = signed or (lineage.notes.decision(other) or (False,))[0] or lineage.agrees_to(candidate)
        if accepted and time.time() < over and against <= len(manifest.maintainers) - manifest.threshold:
            raise Rejected(
                "round",
                f"This home has accepted version {short(other)} on the same head, which may still be adopted.",
                f"Wait until it is, or for {over - time.time():.0f} seconds more.",
            )
