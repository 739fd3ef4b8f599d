"""The history of a model, verified offline from the Manifest on: each version with its verdicts is its own proof.

The caller has opened the records: signatures are checked, and a version's id is the digest of its candidate. What is
checked here is that the versions hang together, and that the maintainers wanted them.

Rounds increase strictly along a chain but need not be consecutive, because a failed round uses up its number.

Two adopted children of one parent are a fork. It takes a threshold too low, maintainers that sign twice or hold back
what they signed, or a network that was cut for longer than a round waits. Nobody can decide then who was first, so
every node has to choose by what the records say alone: the longest chain; of two as long, the one whose version was
adopted in the higher round where they part (a threshold of maintainers had given the other up); then the lower id.
`forks` names them, for people to look into.

A version can amend the Manifest: who decides, by which exam, when, and within which limits. It has its parent's values,
and whatever follows it is judged by what it says, so the chain is verified with the Manifest in force at each link.
"""

from collections.abc import Iterable, Mapping, Sequence

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import ModelId, PeerId, VersionId, short
from p2pmodel.domain.model import BlobRef, Manifest
from p2pmodel.domain.modular import Experts
from p2pmodel.domain.version import BASE_NUMBER, Candidate, Verdict, Version, VersionNumber
from p2pmodel.logic.quorum import electorates


def verify_chain(
    manifest: Manifest, model: ModelId, versions: Sequence[tuple[VersionId, Candidate, Sequence[Verdict]]]
) -> tuple[Version, ...]:
    """The versions after the base, in order, each with the accepting verdicts that count. An empty chain is the base.

    Raises Rejected("chain") for a gap, a fork, a number or round out of order, another model, or verdicts too few.
    """
    chain: list[Version] = []
    parent, number, round, result = VersionId(model), BASE_NUMBER, 0, manifest.base_values
    experts: Experts = ()
    passed: set[VersionId] = set()
    for version, candidate, verdicts in versions:
        if candidate.parent != parent:
            what = "is a second child of an older version" if candidate.parent in passed else "does not follow"
            raise Rejected("chain", f"Version {short(version)} {what}: the one before it is {short(parent)}.")
        if version in passed or version == parent:
            raise Rejected("chain", f"Version {short(version)} is in the chain twice.")
        flaw = _flaw(candidate, model, number, round, result, experts)
        if flaw:
            raise Rejected("chain", f"Version {short(version)} {flaw}.")
        proof = _accepting(version, candidate, verdicts, manifest)
        for electorate in electorates(manifest, candidate):
            if not electorate.adopts(_who(proof)):
                accepts = len(_who(proof) & set(electorate.maintainers))
                raise Rejected(
                    "chain",
                    f"Version {short(version)} is accepted by {accepts} of its maintainers, and "
                    f"{electorate.threshold} have to.",
                )
        chain.append(Version(version, candidate, proof))
        passed.add(parent)
        manifest = manifest.amended(candidate.amendment)
        parent, number, round, result = version, candidate.number, candidate.round, candidate.result
        experts = candidate.experts
    return tuple(chain)


def assemble(
    manifest: Manifest, model: ModelId, candidates: Mapping[VersionId, Candidate], verdicts: Iterable[Verdict]
) -> tuple[Version, ...]:
    """The longest verified chain that these records hold, in whatever order they came; empty for the base alone.

    A function of the set of records: nodes that know the same records choose the same chain, through forks too.
    """
    adopted = _adopted(manifest, model, candidates, verdicts)
    depth: dict[VersionId, int] = {VersionId(model): 0}
    for version in adopted:
        depth[version] = depth[adopted[version].candidate.parent] + 1
    deepest = max(depth.values())
    chains = [_back_to_base(tip, adopted) for tip, steps in depth.items() if steps == deepest]
    chains.sort(key=lambda chain: [(-version.candidate.round, version.id) for version in chain])
    return chains[0]


def in_force(manifest: Manifest, chain: Iterable[Version | Candidate]) -> Manifest:
    """The Manifest as the chain's amendments leave it; `chain` begins at the base."""
    for link in chain:
        manifest = manifest.amended((link.candidate if isinstance(link, Version) else link).amendment)
    return manifest


def place_in_plan(manifest: Manifest, chain: Iterable[Candidate]) -> tuple[int, int]:
    """(which of the planned rounds follows the chain, how many are planned): (0, 1) where none are, or all are over.
    `chain` begins at the base; what counts are versions that merged something."""
    planned, done = manifest.schedule.planned_rounds, 0
    for candidate in chain:
        if candidate.amendment is not None and candidate.amendment.schedule.planned_rounds != planned:
            planned, done = candidate.amendment.schedule.planned_rounds, 0
        done += bool(candidate.patches)
    return (done, planned) if done < planned else (0, 1)


def history(
    manifest: Manifest, model: ModelId, candidates: Mapping[VersionId, Candidate], verdicts: Iterable[Verdict]
) -> tuple[Version, ...]:
    """Every adopted version, those that forks left behind too; parents before children."""
    return tuple(_adopted(manifest, model, candidates, verdicts).values())


def forks(
    manifest: Manifest, model: ModelId, candidates: Mapping[VersionId, Candidate], verdicts: Iterable[Verdict]
) -> tuple[tuple[VersionId, ...], ...]:
    """Every set of adopted versions with the same parent, two or more, sorted: none in a healthy lineage."""
    children: dict[VersionId, list[VersionId]] = {}
    for version in _adopted(manifest, model, candidates, verdicts).values():
        children.setdefault(version.candidate.parent, []).append(version.id)
    return tuple(sorted(tuple(sorted(siblings)) for siblings in children.values() if len(siblings) > 1))


def _adopted(
    manifest: Manifest, model: ModelId, candidates: Mapping[VersionId, Candidate], verdicts: Iterable[Verdict]
) -> dict[VersionId, Version]:
    """All versions with proof of themselves and of what they descend from, parents before children."""
    by_version: dict[VersionId, list[Verdict]] = {}
    for verdict in verdicts:
        by_version.setdefault(verdict.version, []).append(verdict)
    adopted: dict[VersionId, Version] = {}
    force = {VersionId(model): manifest}
    # A child's round is higher than its parent's, so one pass in the order of rounds meets parents first.
    for version, candidate in sorted(candidates.items(), key=lambda item: (item[1].round, item[0])):
        if candidate.parent not in force or version in force:
            continue
        number, round, result = BASE_NUMBER, 0, manifest.base_values
        experts: Experts = ()
        if candidate.parent in adopted:
            parent = adopted[candidate.parent].candidate
            number, round, result, experts = parent.number, parent.round, parent.result, parent.experts
        governing = force[candidate.parent]
        proof = _accepting(version, candidate, by_version.get(version, ()), governing)
        wanted = all(electorate.adopts(_who(proof)) for electorate in electorates(governing, candidate))
        if wanted and not _flaw(candidate, model, number, round, result, experts):
            adopted[version] = Version(version, candidate, proof)
            force[version] = governing.amended(candidate.amendment)
    return adopted


def _flaw(
    candidate: Candidate, model: ModelId, number: VersionNumber, round: int, result: BlobRef | None, experts: Experts
) -> str:
    """What is wrong with a candidate whose parent has this number, round, result (None: neutral values) and experts;
    empty when nothing is."""
    if candidate.model != model:
        return "belongs to another model"
    if candidate.round <= round:
        return f"is of round {candidate.round}, and its parent of round {round}"
    if flaw := candidate.misfit(number, experts):
        return flaw
    if candidate.amends and result is not None and candidate.result != result:
        return "amends the Manifest, and has other values than its parent"
    return ""


def _who(proof: Iterable[Verdict]) -> set[PeerId]:
    return {verdict.maintainer for verdict in proof}


def _accepting(
    version: VersionId, candidate: Candidate, verdicts: Iterable[Verdict], manifest: Manifest
) -> tuple[Verdict, ...]:
    """One accepting verdict of each maintainer that signed one, by maintainer."""
    entitled = {peer for electorate in electorates(manifest, candidate) for peer in electorate.maintainers}
    proof: dict[str, Verdict] = {}
    for verdict in verdicts:
        if (
            verdict.accept
            and verdict.version == version
            and verdict.round == candidate.round
            and verdict.model == candidate.model
            and verdict.maintainer in entitled
        ):
            proof.setdefault(verdict.maintainer, verdict)
    return tuple(proof[maintainer] for maintainer in sorted(proof))


def _back_to_base(tip: VersionId, adopted: Mapping[VersionId, Version]) -> tuple[Version, ...]:
    chain: list[Version] = []
    while tip in adopted:
        chain.append(adopted[tip])
        tip = adopted[tip].candidate.parent
    return tuple(reversed(chain))
