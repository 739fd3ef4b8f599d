"""The Manifest: the immutable identity of a model lineage."""

from dataclasses import dataclass, fields, replace
from math import isfinite

from p2pmodel.domain.ids import Digest, ModelId, PeerId, VersionId, check_digest, check_peer, short

MAX_SLOTS = 100_000
MAX_MAINTAINERS = 64
MAX_PLANNED_ROUNDS = 100_000
MAX_TEXT = 1024
"""Characters of what a Manifest says in words."""


@dataclass(frozen=True)
class BlobRef:
    """Bytes by content: `digest` of `size` bytes."""

    digest: Digest
    size: int

    def __post_init__(self) -> None:
        check_digest(self.digest, "blob digest")
        if self.size < 0:
            raise ValueError("blob size is negative")


@dataclass(frozen=True)
class ModelFile:
    """One file of the base checkpoint, by its name in the Hugging Face folder."""

    name: str
    blob: BlobRef

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or "\\" in self.name or self.name.startswith("."):
            raise ValueError("a model file's name has to be a plain file name")


@dataclass(frozen=True)
class Slot:
    """A tensor that patches may change. `name` is `KIND:place`, such as `ia3:out:model.layers.3.self_attn.k_proj`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 512:
            raise ValueError("slot name is empty or too long")
        if not self.shape or any(n <= 0 for n in self.shape):
            raise ValueError(f"slot {self.name} has no positive shape")


MOMENTUM = "momentum"


@dataclass(frozen=True)
class MergeSpec:
    """A merge strategy by its registered name and version (`fisher@1`), and its parameters, sorted by name."""

    strategy: str
    parameters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if list(self.parameters) != sorted(set(self.parameters)) or not all(isfinite(v) for _, v in self.parameters):
            raise ValueError("merge parameters have to be finite, unique and sorted by name")

    @property
    def momentum(self) -> float:
        """μ of the outer momentum, which any strategy can have: 0 when it is not given."""
        return dict(self.parameters).get(MOMENTUM, 0.0)

    @property
    def of_strategy(self) -> dict[str, float]:
        """The parameters that are the strategy's own."""
        return {name: value for name, value in self.parameters if name != MOMENTUM}


@dataclass(frozen=True)
class Schedule:
    """When a round moves on. Seconds are local: every node counts from when it saw the phase begin.

    min_patches: the round is sealed as soon as that many are admitted; open_seconds: or after this, if there is one;
    proposer_seconds: how long the next proposer waits for a silent one; verdict_seconds: for verdicts, before the round
    is abandoned.

    planned_rounds: that contributors' learning rate follows one schedule over, from the version on that planned them;
    0: every training has a schedule of its own.
    """

    min_patches: int = 3
    max_patches: int = 1000
    open_seconds: float = 3600.0
    proposer_seconds: float = 120.0
    verdict_seconds: float = 600.0
    planned_rounds: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.planned_rounds <= MAX_PLANNED_ROUNDS:
            raise ValueError(f"schedule: 0 to {MAX_PLANNED_ROUNDS} rounds can be planned")
        if not 1 <= self.min_patches <= self.max_patches:
            raise ValueError("schedule: 1 <= min_patches <= max_patches does not hold")
        durations = (self.open_seconds, self.proposer_seconds, self.verdict_seconds)
        if not all(isfinite(seconds) and seconds > 0 for seconds in durations):
            raise ValueError("schedule: durations have to be positive and finite")


MAX_PATCH_BYTES = 1 << 40
MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True)
class Limits:
    """What is refused before it costs memory, and how much worse than its parent (relative) a version may be on any
    domain of the exam."""

    max_patch_bytes: int = 64 << 20
    max_header_bytes: int = 1 << 20
    regression_tolerance: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.max_patch_bytes <= MAX_PATCH_BYTES or not 0 < self.max_header_bytes <= MAX_HEADER_BYTES:
            raise ValueError(
                f"limits: a patch has 1 to {MAX_PATCH_BYTES} bytes, and its record 1 to {MAX_HEADER_BYTES}"
            )
        if not 0 <= self.regression_tolerance < 1:
            raise ValueError("limits: the tolerance is 0 or more, and less than 1")


@dataclass(frozen=True)
class Amendment:
    """What a Manifest says from the version on that brings it: who decides, by which exam, when, and within which
    limits. All of it is written out, what stays as it was too."""

    maintainers: tuple[PeerId, ...]
    threshold: int
    exam: BlobRef
    schedule: Schedule
    limits: Limits

    def __post_init__(self) -> None:
        _check_maintainers(self.maintainers, self.threshold)

    def differences(self, after: "Amendment") -> list[str]:
        """A few words for each thing that another one says otherwise."""
        found = [f"maintainer {peer} comes" for peer in after.maintainers if peer not in self.maintainers]
        found += [f"maintainer {peer} goes" for peer in self.maintainers if peer not in after.maintainers]
        if after.threshold != self.threshold:
            found.append(f"threshold {self.threshold} to {after.threshold}")
        if after.exam != self.exam:
            found.append(f"exam {short(self.exam.digest)} to {short(after.exam.digest)}")
        for old, new in ((self.schedule, after.schedule), (self.limits, after.limits)):
            for field in fields(old):
                was, now = getattr(old, field.name), getattr(new, field.name)
                if was != now:
                    found.append(f"{field.name.replace('_', ' ')} {was} to {now}")
        return found


def check_name(name: str) -> None:
    """Of a model. Raises ValueError."""
    if not name or len(name) > 64 or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError("a model's name has 1 to 64 letters, digits, '-', '_' or '.'")


def _check_maintainers(maintainers: tuple[PeerId, ...], threshold: int) -> None:
    if not maintainers or len(maintainers) > MAX_MAINTAINERS:
        raise ValueError(f"a model has 1 to {MAX_MAINTAINERS} maintainers")
    if len(set(maintainers)) != len(maintainers):
        raise ValueError("a maintainer is named twice")
    if list(maintainers) != sorted(maintainers):
        raise ValueError("maintainers' keys have to be sorted")
    for peer in maintainers:
        check_peer(peer, "maintainer")
    if not 1 <= threshold <= len(maintainers):
        raise ValueError(f"the threshold has to be between 1 and the number of maintainers, {len(maintainers)}")


@dataclass(frozen=True)
class Origin:
    """The version that a branch begins with. model, version, number: which one it is of which lineage over the same
    files, as its founder says; result: the values of all slots there, which are those of the branch's base version."""

    model: ModelId
    version: VersionId
    number: str
    result: BlobRef

    def __post_init__(self) -> None:
        check_digest(self.model, "origin's model")
        check_digest(self.version, "origin's version")
        parts = self.number.split(".")
        if len(self.number) > 32 or len(parts) != 3 or not all(p.isascii() and p.isdecimal() for p in parts):
            raise ValueError("the origin's number is none of a version, such as 1.0.2")
        if not self.result.size:
            raise ValueError("the origin has no values")


@dataclass(frozen=True)
class Manifest:
    """`files`: config, weights and tokenizer of the base, sorted by name. `exam`: the suite's archive.
    `source`: where the base can be had (`org/name@commit` on a model hub), or empty. `origin`: of a branch; without
    one the slots of the base version are neutral."""

    name: str
    created: int
    architecture: str
    layers: int
    files: tuple[ModelFile, ...]
    source: str
    licence: str
    kinds: tuple[str, ...]
    slots: tuple[Slot, ...]
    merge: MergeSpec
    exam: BlobRef
    schedule: Schedule
    limits: Limits
    maintainers: tuple[PeerId, ...]
    threshold: int
    origin: Origin | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        texts = (self.architecture, self.source, self.licence, self.merge.strategy, *self.kinds)
        if not all(len(text) <= MAX_TEXT and text.isprintable() for text in texts):
            raise ValueError(f"a model's texts have at most {MAX_TEXT} characters, all of them printable")
        if not 1 <= self.layers <= 10_000:
            raise ValueError("the number of layers is out of range")
        names = [f.name for f in self.files]
        if not names or names != sorted(set(names)):
            raise ValueError("the files have to be unique and sorted by name")
        slots = [s.name for s in self.slots]
        if len(slots) > MAX_SLOTS or slots != sorted(set(slots)):
            raise ValueError("the slots have to be unique, sorted by name, and not too many")
        _check_maintainers(self.maintainers, self.threshold)

    def amended(self, amendment: Amendment | None) -> "Manifest":
        """With what the amendment says instead; the model id stays that of the first."""
        if amendment is None:
            return self
        return replace(self, **{field.name: getattr(amendment, field.name) for field in fields(Amendment)})

    @property
    def base_values(self) -> BlobRef | None:
        """Of all slots at the base version; None where they are neutral, which the slots alone say."""
        return None if self.origin is None else self.origin.result

    @property
    def amendment(self) -> Amendment:
        """What of it an amendment can change."""
        return Amendment(self.maintainers, self.threshold, self.exam, self.schedule, self.limits)
