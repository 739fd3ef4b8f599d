"""Asides: candidates that merge nothing, on which people decide: to amend the Manifest, to remove experts, to go back.

Each is a version of its own, in the same chain. No exam has an opinion on an amendment; a removal costs the experts'
domains, and the version that a rollback leaves passed its exam. So each maintainer's node signs only what its
maintainer has approved, and of a rollback exactly the step to which it has agreed.

An amendment, `amend@1`, has its parent's values, and is adopted by the maintainers of before, and by those of after
where these are others (`logic.quorum.electorates`). A removal, `remove@1`, has them but for the experts'. A rollback,
`restore@1`, has those of a version before its parent: the history only grows, and it costs no storage.

Proposing signs and stores the candidate, on the head; the node then announces it. It gives the candidate's record, and
the id of the version that it would become. Who has accepted another aside on the head has to wait: Rejected.
"""

from collections.abc import Sequence

from p2pmodel.domain.errors import Rejected, UsageError
from p2pmodel.domain.ids import Digest, VersionId
from p2pmodel.domain.model import Amendment, MergeSpec
from p2pmodel.domain.modular import Experts
from p2pmodel.domain.version import AMEND, REMOVE, RESTORE, Candidate
from p2pmodel.logic import turns
from p2pmodel.node.lineages.intake import sign_and_store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import state_bytes, version_state
from p2pmodel.node.rounds.deciding import demand_free
from p2pmodel.tensors import blob
from p2pmodel.tensors.experts import without_experts
from p2pmodel.wire import records


def propose_amendment(lineage: Lineage, amendment: Amendment) -> tuple[Digest, VersionId]:
    """Approved by this home. Raises Rejected, UsageError when it changes nothing."""
    _demand_maintainer(lineage, "may amend its Manifest")
    if amendment == lineage.manifest.amendment:
        raise UsageError(
            f"The Manifest of {lineage.manifest.name} says all of this already.", "Name what is to change."
        )
    values, experts = state_bytes(lineage, lineage.head), lineage.experts(lineage.head)
    record, version = _propose(lineage, AMEND, values, experts, amendment)
    lineage.notes.decide(version, accept=True)
    return record, version


def propose_removal(lineage: Lineage, names: Sequence[str]) -> tuple[Digest, VersionId]:
    """Approved by this home. names: of experts. Raises Rejected, NotFound for a name that the head has no expert of."""
    _demand_maintainer(lineage, "decide what is removed")
    gone = {lineage.find_expert(lineage.head, name) for name in names}
    left = tuple(expert for expert in lineage.experts(lineage.head) if expert not in gone)
    values = blob.pack(without_experts(version_state(lineage, lineage.head), left))
    record, version = _propose(lineage, REMOVE, values, left)
    lineage.notes.decide(version, accept=True)
    return record, version


def propose_rollback(lineage: Lineage, version: VersionId) -> tuple[Digest, VersionId]:
    """Agreed to by this home. Raises UsageError, Rejected, NotFound when the old values are not here."""
    _demand_step_back(lineage, version)
    record, proposed = _propose(lineage, RESTORE, state_bytes(lineage, version), lineage.experts(version))
    lineage.notes.agree_to_rollback(lineage.head, version)
    return record, proposed


def agree_to_rollback(lineage: Lineage, version: VersionId) -> None:
    """For as long as the head is what it is now. Raises UsageError, Rejected."""
    _demand_step_back(lineage, version)
    lineage.notes.agree_to_rollback(lineage.head, version)


def _demand_step_back(lineage: Lineage, version: VersionId) -> None:
    _demand_maintainer(lineage, "decide on a rollback")
    if lineage.result(version) == lineage.result(lineage.head):
        raise UsageError(f"The head of {lineage.manifest.name} has these values already.", "Name an older version.")


def next_round(lineage: Lineage) -> int:
    """After all that this home's maintainer has signed in, and that candidates on the head are of, but for such as name
    a round far ahead."""
    last = lineage.versions[-1].candidate.round if lineage.versions else 0
    mine = [verdict.round for verdict in lineage.verdicts.values() if verdict.maintainer == lineage.home.key.peer]
    known = [candidate.round for candidate in lineage.candidates.values() if candidate.parent == lineage.head]
    return turns.next_round(max([last, *mine]), known)


def _demand_maintainer(lineage: Lineage, who: str) -> None:
    if lineage.home.key.peer not in lineage.manifest.maintainers:
        raise Rejected(
            "maintainer",
            f"This home's key is none of the maintainers of {lineage.manifest.name}, who {who}.",
            "Ask one of them; see p2pmodel model show",
        )


def _propose(
    lineage: Lineage, merge: MergeSpec, values: bytes, experts: Experts, amendment: Amendment | None = None
) -> tuple[Digest, VersionId]:
    demand_free(lineage)
    candidate = Candidate(
        model=lineage.model,
        round=next_round(lineage),
        parent=lineage.head,
        number=lineage.number(lineage.head).after(lineage.experts(lineage.head), experts),
        patches=(),
        left_out=(),
        merge=merge,
        alpha=0.0,
        result=lineage.home.objects.put(values),
        amendment=amendment,
        experts=experts,
    )
    return sign_and_store(lineage, "candidate", candidate), records.version_id(candidate)
