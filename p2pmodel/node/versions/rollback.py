"""Going back: a new version that has the values of an old one.

The history only grows. A rollback is a candidate that merges nothing, `restore@1`, whose result is that of a version
before its parent; it costs no storage. Exams would refuse it, since the version that it leaves passed them, so each
maintainer's node accepts it only where the maintainer has agreed to exactly this step.
"""

from p2pmodel.domain.errors import Rejected, UsageError
from p2pmodel.domain.ids import Digest, VersionId
from p2pmodel.domain.version import RESTORE, Candidate
from p2pmodel.logic.turns import next_round
from p2pmodel.node.lineages.intake import needed_blobs, store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.versions.checkout import state_bytes
from p2pmodel.wire import records


def agree_to(lineage: Lineage, version: VersionId) -> None:
    """For as long as the head is what it is now. Raises UsageError, Rejected."""
    if lineage.home.key.peer not in lineage.manifest.maintainers:
        raise Rejected(
            "maintainer",
            f"This home's key is none of the maintainers of {lineage.manifest.name}, who decide on a rollback.",
            "Ask one of them; see p2pmodel model show",
        )
    if lineage.result(version) == lineage.result(lineage.head):
        raise UsageError(f"The head of {lineage.manifest.name} has these values already.", "Name an older version.")
    lineage.agree_to_rollback(version)


def propose(lineage: Lineage, version: VersionId) -> tuple[Digest, VersionId]:
    """Signs and stores the candidate, which the node then announces. -> its record, and the id of the version that it
    would become. Raises UsageError, Rejected, NotFound when the old values are not here."""
    agree_to(lineage, version)
    result = lineage.home.objects.put(state_bytes(lineage, version))
    last = lineage.versions[-1].candidate.round if lineage.versions else 0
    mine = [verdict.round for verdict in lineage.verdicts.values() if verdict.maintainer == lineage.home.key.peer]
    known = [candidate.round for candidate in lineage.candidates.values() if candidate.parent == lineage.head]
    candidate = Candidate(
        model=lineage.model,
        round=next_round(max([last, *mine]), known),
        parent=lineage.head,
        number=lineage.number(lineage.head).after(lineage.experts(lineage.head), lineage.experts(version)),
        patches=(),
        left_out=(),
        merge=RESTORE,
        alpha=0.0,
        result=result,
        experts=lineage.experts(version),
    )
    record = lineage.home.key.sign("candidate", candidate)
    stored = store(lineage, "candidate", record, needed_blobs(lineage, "candidate", record))
    lineage.refresh()
    return stored.digest, records.version_id(candidate)
