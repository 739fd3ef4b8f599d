"""The nouns of rounds.py: phases, what a node knows of its round, what happens to it, and what follows."""

from dataclasses import dataclass
from enum import Enum

from p2pmodel.domain.ids import ModelId, PatchId, PeerId, VersionId
from p2pmodel.domain.model import Manifest, Schedule
from p2pmodel.domain.version import Verdict
from p2pmodel.logic.quorum import Electorate, Vote


class Phase(Enum):
    OPEN = "open"  # patches are admitted
    SEALED = "sealed"  # a proposer merges and examines
    VOTING = "voting"  # a candidate is known, verdicts are awaited
    ADOPTED = "adopted"
    REJECTED = "rejected"  # too many maintainers said no, or were divided
    ABANDONED = "abandoned"  # too few said anything in time


@dataclass(frozen=True)
class RoundRules:
    """What the Manifest says of rounds."""

    schedule: Schedule
    maintainers: tuple[PeerId, ...]
    threshold: int
    model: ModelId

    @classmethod
    def from_manifest(cls, manifest: Manifest, model: ModelId) -> "RoundRules":
        return cls(manifest.schedule, manifest.maintainers, manifest.threshold, model)


@dataclass(frozen=True)
class Proposal:
    """A known candidate. `patches` are those that it settles, merged or left out; `also`: who has to accept it besides
    the maintainers, since it would make them decide; aside: it merges nothing, so people decide on it, and no round
    waits for it; heard: when, by the local clock."""

    version: VersionId
    round: int
    proposer: PeerId
    patches: tuple[PatchId, ...]
    also: Electorate | None = None
    aside: bool = False
    heard: float = 0.0


@dataclass(frozen=True)
class RoundState:
    """since: when the phase began, by the local clock, of VOTING: when the candidate was heard of; waiting: since when
    patches wait for the round to be sealed, through rounds that failed; patches: admitted to this round, sorted; late:
    admitted after it was sealed; settled: those that rejected candidates on this parent have spoiled, never taken
    again; retry: when a proposal that failed is tried again; signed: the version of this round that this node examines
    or has signed; signed_round: the highest round that it signed a merge's verdict in, on any parent; accepted: its own
    votes that accept; asked: the asides that it examines in this round."""

    phase: Phase
    round: int
    parent: VersionId
    since: float
    waiting: float
    patches: tuple[PatchId, ...] = ()
    late: tuple[PatchId, ...] = ()
    settled: frozenset[PatchId] = frozenset()
    candidates: tuple[Proposal, ...] = ()
    votes: tuple[Vote, ...] = ()
    proposed: bool = False
    retry: float | None = None
    signed: VersionId | None = None
    signed_round: int = 0
    accepted: tuple[Vote, ...] = ()
    asked: tuple[VersionId, ...] = ()
    adopted: Proposal | None = None

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.ADOPTED, Phase.REJECTED, Phase.ABANDONED)


@dataclass(frozen=True)
class PatchesAdmitted:
    """Patches on the state's parent passed all checks: one that has come, or all that were waiting for the parent."""

    patches: tuple[PatchId, ...]


@dataclass(frozen=True)
class PatchesRefused:
    """This node, as proposer, found that none of these can be merged, and makes no candidate of them."""

    patches: tuple[PatchId, ...]


@dataclass(frozen=True)
class ProposalFailed:
    """This node, as proposer, could not finish (a full disk, a blob that nobody has now), whatever the patches are
    worth: it is asked again after `proposer_seconds`, if nobody else has proposed."""


@dataclass(frozen=True)
class CandidateSeen:
    """A candidate on the state's parent passed `admission.check_candidate`. `patches`: merged and left out; `also`,
    `aside`: see Proposal. Verdicts of peers that only the candidate entitles are to be fed again after it."""

    version: VersionId
    proposer: PeerId
    patches: tuple[PatchId, ...]
    round: int
    also: Electorate | None = None
    aside: bool = False


@dataclass(frozen=True)
class Decided:
    """This maintainer's person has said what becomes of an aside: to be fed again as long as the word stands, and no
    verdict of this node follows from it."""

    version: VersionId


@dataclass(frozen=True)
class VerdictSeen:
    """Anybody's, this node's own too: any round, any version."""

    verdict: Verdict


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = PatchesAdmitted | PatchesRefused | ProposalFailed | CandidateSeen | Decided | VerdictSeen | Tick


@dataclass(frozen=True)
class Propose:
    """This node is the proposer now: examine and merge `patches`, announce a candidate if `may_propose` still holds."""

    round: int
    parent: VersionId
    patches: tuple[PatchId, ...]


@dataclass(frozen=True)
class Examine:
    """This maintainer recomputes the version and runs the exam, and signs a verdict if `may_sign` still holds."""

    version: VersionId


@dataclass(frozen=True)
class Adopt:
    """A threshold of maintainers accepted it: the new head."""

    version: VersionId


@dataclass(frozen=True)
class Reject:
    round: int
    reason: str


@dataclass(frozen=True)
class Abandon:
    round: int
    reason: str


@dataclass(frozen=True)
class Misbehaviour:
    """The maintainer accepted two versions in one round; its two verdicts are the proof."""

    maintainer: PeerId
    version_a: VersionId
    version_b: VersionId


Effect = Propose | Examine | Adopt | Reject | Abandon | Misbehaviour
