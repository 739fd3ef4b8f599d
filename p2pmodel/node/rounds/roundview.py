"""The round on the head as a home's records show it, for people: what is proposed, and who said what of it."""

from dataclasses import dataclass

from p2pmodel.domain.ids import PatchId, PeerId, VersionId
from p2pmodel.domain.modular import removed
from p2pmodel.domain.version import Candidate, DomainScore, LeftOut
from p2pmodel.logic.lineage import forks
from p2pmodel.logic.quorum import Electorate, double_signers, electorates, tally
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.rounds.deciding import closing


@dataclass(frozen=True)
class CandidateView:
    """what: `merges 3 patches`, `restores 1.0.1` or `amends …`. patches: what it merges, and whose they are, empty
    where that is not known here. scores: as this home's node has examined it, none as long as it has not. until: when
    people have to have decided, in seconds since the epoch. accepts … silent: those who decide on it, each in one.
    decision: what this home's maintainer has said, empty as long as it has said nothing. electorates: who has to accept
    it."""

    version: VersionId
    round: int
    proposer: PeerId
    what: str
    alpha: float
    patches: tuple[tuple[PatchId, str], ...]
    left_out: tuple[LeftOut, ...]
    scores: tuple[DomainScore, ...]
    until: float
    electorates: tuple[Electorate, ...]
    accepts: tuple[PeerId, ...]
    rejects: tuple[tuple[PeerId, str], ...]
    silent: tuple[PeerId, ...]
    decision: str


@dataclass(frozen=True)
class DoubleSigner:
    """The proof: the digests of two or more verdicts of one maintainer on different versions of one round."""

    maintainer: PeerId
    round: int
    versions: tuple[VersionId, ...]
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class RoundView:
    """patches: on the head, not merged yet. maintains: whether this home's key is one of the maintainers."""

    model: str
    name: str
    head: VersionId
    number: str
    patches: tuple[PatchId, ...]
    maintainers: tuple[PeerId, ...]
    threshold: int
    maintains: bool
    candidates: tuple[CandidateView, ...]
    double_signers: tuple[DoubleSigner, ...]
    forks: tuple[tuple[VersionId, ...], ...]


def look(lineage: Lineage) -> RoundView:
    manifest, head = lineage.manifest, lineage.head
    candidates = [version for version, candidate in lineage.candidates.items() if candidate.parent == head]
    return RoundView(
        lineage.model,
        manifest.name,
        head,
        str(lineage.number(head)),
        tuple(sorted(patch for patch, header in lineage.patches.items() if header.parent == head)),
        manifest.maintainers,
        manifest.threshold,
        lineage.home.key.peer in manifest.maintainers,
        tuple(_candidate(lineage, v) for v in sorted(candidates, key=lambda v: (lineage.candidates[v].round, v))),
        _double_signers(lineage),
        forks(lineage.founding, lineage.model, lineage.candidates, lineage.verdicts.values()),
    )


def _candidate(lineage: Lineage, version: VersionId) -> CandidateView:
    candidate = lineage.candidates[version]
    wanted = electorates(lineage.manifest, candidate)
    everyone = sorted({peer for each in wanted for peer in each.maintainers})
    counted = tally(version, candidate.round, lineage.verdicts.values(), everyone)
    reasons = {v.maintainer: v.reason for v in lineage.verdicts.values() if v.version == version}
    decision = lineage.notes.decision(version)
    me = lineage.home.key.peer
    mine = [v for v in lineage.verdicts.values() if v.version == version and v.maintainer == me]
    return CandidateView(
        version,
        candidate.round,
        lineage.proposers[version][0],
        describe(lineage, candidate),
        candidate.alpha,
        tuple((p, lineage.patches[p].contributor if p in lineage.patches else "") for p in candidate.patches),
        candidate.left_out,
        mine[0].scores if mine else lineage.notes.scores(version),
        closing(lineage, version),
        wanted,
        counted.accepts,
        tuple((peer, reasons[peer]) for peer in counted.rejects),
        tuple(sorted((*counted.silent, *counted.elsewhere))),
        "" if decision is None else "approved" if decision[0] else "rejected",
    )


def describe(lineage: Lineage, candidate: Candidate) -> str:
    """What a candidate, or a version that it became, does to its parent."""
    if candidate.restores:
        return f"restores {lineage.number(lineage.restored_by(candidate))}"
    if candidate.removes:
        return f"removes {', '.join(removed(candidate.experts, lineage.experts(candidate.parent)))}"
    if candidate.amendment is not None:
        before = lineage.manifest_at(candidate.parent).amendment
        return "amends " + "; ".join(before.differences(candidate.amendment))
    left_out = f", leaves out {len(candidate.left_out)}" if candidate.left_out else ""
    many = "1 patch" if len(candidate.patches) == 1 else f"{len(candidate.patches)} patches"
    return f"merges {many} by {candidate.merge.strategy}, α {candidate.alpha:g}{left_out}"


def _double_signers(lineage: Lineage) -> tuple[DoubleSigner, ...]:
    found = []
    for (maintainer, round), versions in double_signers(lineage.verdicts.values()).items():
        proof = [d for d, v in lineage.verdicts.items() if v.maintainer == maintainer and v.round == round]
        found.append(DoubleSigner(maintainer, round, versions, tuple(sorted(proof))))
    return tuple(found)
