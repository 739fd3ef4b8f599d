"""Versions: what a round proposes, what the maintainers say of it, and what it becomes."""

from dataclasses import dataclass
from math import isfinite

from p2pmodel.domain.ids import ModelId, PatchId, PeerId, VersionId, check_digest, check_peer
from p2pmodel.domain.model import Amendment, BlobRef, MergeSpec
from p2pmodel.domain.modular import Experts, check_experts


@dataclass(frozen=True, order=True)
class VersionNumber:
    """Semantic: patch = values only, minor = structure added, major = another base."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @classmethod
    def parse(cls, text: str) -> "VersionNumber":
        parts = text.removeprefix("v").split(".")
        if len(parts) != 3 or not all(p.isdecimal() for p in parts):
            raise ValueError(f"{text!r} is not a version number such as 1.0.2")
        return cls(*(int(p) for p in parts))

    def next_patch(self) -> "VersionNumber":
        return VersionNumber(self.major, self.minor, self.patch + 1)

    def next_minor(self) -> "VersionNumber":
        return VersionNumber(self.major, self.minor + 1, 0)

    def after(self, before: Experts, now: Experts) -> "VersionNumber":
        """Of the version that follows one with the experts `before`."""
        return self.next_patch() if before == now else self.next_minor()


BASE_NUMBER = VersionNumber(1, 0, 0)
RESTORE = MergeSpec("restore@1")
"""Of a candidate that merges nothing, and gives all slots the values of an older version of its chain."""
AMEND = MergeSpec("amend@1")
"""Of a candidate that merges nothing, has the values of its parent, and amends the Manifest."""
REMOVE = MergeSpec("remove@1")
"""Of a candidate that merges nothing, and has the values of its parent without those of some experts."""

MAX_REASON = 256
"""Characters, of a verdict or of leaving out a patch."""
MAX_ROUND = 2**63 - 1
"""Where the integers of a home's index (SQLite) end; those of records (msgpack) do not."""


@dataclass(frozen=True)
class LeftOut:
    """A patch of the round that is not merged, and why."""

    patch: PatchId
    reason: str

    def __post_init__(self) -> None:
        check_digest(self.patch, "patch")
        if not self.reason or len(self.reason) > MAX_REASON:
            raise ValueError("the reason for leaving out a patch is empty or too long")


@dataclass(frozen=True)
class Candidate:
    """A proposed next version. `patches` are sorted by id; `result` is the safetensors blob of all slots after the
    merge; `alpha` the scale that the proposer found on the exam's tuning split. `weights`: the maintainers' λ of each
    patch, empty where all are 1; `control`: the mean of the patches' control variates, where they have any;
    `amendment`: of one that merges nothing and amends the Manifest; `experts`: all that the version has."""

    model: ModelId
    round: int
    parent: VersionId
    number: VersionNumber
    patches: tuple[PatchId, ...]
    left_out: tuple[LeftOut, ...]
    merge: MergeSpec
    alpha: float
    result: BlobRef
    weights: tuple[float, ...] = ()
    control: BlobRef | None = None
    amendment: Amendment | None = None
    experts: Experts = ()

    def __post_init__(self) -> None:
        check_digest(self.model, "candidate model")
        check_digest(self.parent, "candidate parent")
        if not 1 <= self.round <= MAX_ROUND:
            raise ValueError("rounds count from 1, in 63 bits")
        if self.amends != (self.amendment is not None):
            raise ValueError("a candidate amends the Manifest when its merge says so, and only then")
        if self.aside and (self.patches or self.left_out or self.control is not None):
            raise ValueError("a candidate that restores a version, removes or amends settles no patches")
        check_experts(self.experts)
        if (not self.aside and not self.patches) or list(self.patches) != sorted(set(self.patches)):
            raise ValueError("a candidate's patches have to be unique and sorted, at least one")
        for patch in self.patches:
            check_digest(patch, "candidate patch")
        if not isfinite(self.alpha):
            raise ValueError("alpha has to be finite")
        if self.weights:
            if len(self.weights) != len(self.patches) or set(self.weights) == {1.0}:
                raise ValueError("a candidate's weights are one for each patch, and left out where all are 1")
            if not all(isfinite(w) and w >= 0 for w in self.weights) or not any(self.weights):
                raise ValueError("a candidate's weights have to be finite, not negative, and not all zero")

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """The result, and the control variate where there is one."""
        return (self.result,) if self.control is None else (self.result, self.control)

    def weight(self, patch: PatchId) -> float:
        """λ of one of the patches."""
        return self.weights[self.patches.index(patch)] if self.weights else 1.0

    @property
    def restores(self) -> bool:
        return self.merge == RESTORE

    @property
    def amends(self) -> bool:
        return self.merge == AMEND

    @property
    def removes(self) -> bool:
        return self.merge == REMOVE

    @property
    def aside(self) -> bool:
        """It merges nothing, so people decide on it."""
        return self.merge in (RESTORE, AMEND, REMOVE)

    def misfit(self, number: VersionNumber, experts: Experts) -> str:
        """What of its number and its experts does not follow a parent of that number and with those experts; empty
        when all does."""
        own, before = set(self.experts), set(experts)
        if self.removes and not own < before:
            return "removes no expert of its parent, or has others than its parent"
        if self.amends and own != before:
            return "amends the Manifest, and has other experts than its parent"
        if not self.aside and not own >= before:
            return "lacks an expert of its parent, and says nothing of removing it"
        expected = number.after(experts, self.experts)
        return "" if self.number == expected else f"is numbered {self.number}, and has to be {expected}"


@dataclass(frozen=True)
class DomainScore:
    """On the deciding split of one section of the exam: of the base version, of the parent, of the candidate, and of
    the plain mean of the same patches, None where that has no finite scores. Lower is better: a loss in nats per byte
    for a domain; for every other section, which is named `KIND/NAME`, the share of its cases that fail."""

    domain: str
    base: float
    parent: float
    candidate: float
    mean: float | None

    def __post_init__(self) -> None:
        scores = (self.base, self.parent, self.candidate, 0.0 if self.mean is None else self.mean)
        if not all(isfinite(x) and x >= 0 for x in scores):
            raise ValueError("scores have to be finite and not negative")


@dataclass(frozen=True)
class Verdict:
    """A maintainer's word on a candidate. One maintainer signs one candidate a round."""

    maintainer: PeerId
    model: ModelId
    round: int
    version: VersionId
    accept: bool
    reason: str
    scores: tuple[DomainScore, ...]

    def __post_init__(self) -> None:
        check_peer(self.maintainer, "maintainer")
        check_digest(self.model, "verdict model")
        check_digest(self.version, "verdict version")
        if not 1 <= self.round <= MAX_ROUND or len(self.reason) > MAX_REASON or len(self.scores) > 64:
            raise ValueError("verdict is out of range")


@dataclass(frozen=True)
class Version:
    """An adopted candidate, with the accepting verdicts that adopted it: its own proof, from the Manifest on."""

    id: VersionId
    candidate: Candidate
    verdicts: tuple[Verdict, ...]

    @property
    def scores(self) -> tuple[DomainScore, ...]:
        """Of the first of its verdicts that has any; empty when none has."""
        return next((verdict.scores for verdict in self.verdicts if verdict.scores), ())
