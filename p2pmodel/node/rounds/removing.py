"""Taking experts out of a model: a new version without them.

It is a candidate that merges nothing, `remove@1`, with the values of its parent but those of the experts. An exam can't
want it, since the experts' domains lose by it; each maintainer's node signs only what its maintainer has approved.
"""

from collections.abc import Sequence

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import Digest, VersionId
from p2pmodel.domain.version import REMOVE, Candidate
from p2pmodel.node.lineages.intake import needed_blobs, store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.node.rounds.amending import next_round
from p2pmodel.tensors import blob
from p2pmodel.tensors.experts import without_experts
from p2pmodel.wire import records


def propose(lineage: Lineage, names: Sequence[str]) -> tuple[Digest, VersionId]:
    """Signs and stores the candidate on the head, approved by this home; the node then announces it. -> its record, and
    the id of the version that it would become. Raises Rejected, NotFound for a name that the head has no expert of."""
    if lineage.home.key.peer not in lineage.manifest.maintainers:
        raise Rejected(
            "maintainer",
            f"This home's key is none of the maintainers of {lineage.manifest.name}, who decide what is removed.",
            "Ask one of them; see p2pmodel model show",
        )
    before = lineage.experts(lineage.head)
    known = {expert.name for expert in before}
    for name in names:
        if name not in known:
            raise NotFound(
                f"{lineage.manifest.name} {lineage.number(lineage.head)} has no expert {name[:64]!r}.",
                f"It has: {', '.join(sorted(known)) or 'none'}.",
            )
    left = tuple(expert for expert in before if expert.name not in names)
    result = lineage.home.objects.put(blob.pack(without_experts(version_state(lineage, lineage.head), left)))
    candidate = Candidate(
        model=lineage.model,
        round=next_round(lineage),
        parent=lineage.head,
        number=lineage.number(lineage.head).after(before, left),
        patches=(),
        left_out=(),
        merge=REMOVE,
        alpha=0.0,
        result=result,
        experts=left,
    )
    record = lineage.home.key.sign("candidate", candidate)
    stored = store(lineage, "candidate", record, needed_blobs(lineage, "candidate", record))
    lineage.refresh()
    version = records.version_id(candidate)
    lineage.decide(version, accept=True)
    return stored.digest, version
