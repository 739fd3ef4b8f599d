"""Versions: what a round proposes, what the maintainers say of it, and what it becomes."""

from dataclasses import dataclass
from math import isfinite

from p2pmodel.domain.ids import ModelId, PatchId, PeerId, VersionId, check_digest, check_peer
from p2pmodel.domain.model import BlobRef, MergeSpec


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


BASE_NUMBER = VersionNumber(1, 0, 0)


@dataclass(frozen=True)
class LeftOut:
    """A patch of the round that is not merged, and why."""

    patch: PatchId
    reason: str

    def __post_init__(self) -> None:
        check_digest(self.patch, "patch")
        if not self.reason or len(self.reason) > 256:
            raise ValueError("the reason for leaving out a patch is empty or too long")


@dataclass(frozen=True)
class Candidate:
    """A proposed next version. `patches` are sorted by id; `result` is the safetensors blob of all slots after the
    merge;
    `alpha` the scale that the proposer found on the exam's tuning split."""

    model: ModelId
    round: int
    parent: VersionId
    number: VersionNumber
    patches: tuple[PatchId, ...]
    left_out: tuple[LeftOut, ...]
    merge: MergeSpec
    alpha: float
    result: BlobRef

    def __post_init__(self) -> None:
        check_digest(self.model, "candidate model")
        check_digest(self.parent, "candidate parent")
        if self.round < 1:
            raise ValueError("rounds count from 1")
        if not self.patches or list(self.patches) != sorted(set(self.patches)):
            raise ValueError("a candidate's patches have to be unique and sorted, at least one")
        for patch in self.patches:
            check_digest(patch, "candidate patch")
        if not isfinite(self.alpha):
            raise ValueError("alpha has to be finite")


@dataclass(frozen=True)
class DomainScore:
    """Loss in nats per byte on the deciding split of one domain of the exam: of the base version, of the parent, of the
    candidate, and of the plain mean of the same patches."""

    domain: str
    base: float
    parent: float
    candidate: float
    mean: float

    def __post_init__(self) -> None:
        if not all(isfinite(x) and x >= 0 for x in (self.base, self.parent, self.candidate, self.mean)):
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
        if self.round < 1 or len(self.reason) > 256 or len(self.scores) > 64:
            raise ValueError("verdict is out of range")


@dataclass(frozen=True)
class Version:
    """An adopted candidate, with the verdicts that adopted it: its own proof, from the Manifest on."""

    id: VersionId
    candidate: Candidate
    verdicts: tuple[Verdict, ...]
