"""A patch: an immutable, signed change against exactly one parent version, with what it was trained on."""

from dataclasses import dataclass
from math import isfinite

from p2pmodel.domain.ids import Digest, ModelId, PeerId, VersionId, check_digest, check_peer
from p2pmodel.domain.model import BlobRef


@dataclass(frozen=True)
class DataFile:
    """A file that the patch was trained on; `name` is its base name, `licence` an SPDX identifier or empty."""

    name: str
    digest: Digest
    size: int
    examples: int
    licence: str

    def __post_init__(self) -> None:
        check_digest(self.digest, "data file digest")
        if len(self.name) > 255 or len(self.licence) > 128 or self.size < 0 or self.examples < 0:
            raise ValueError("data file entry is out of range")


@dataclass(frozen=True)
class Recipe:
    """How it was trained: enough to do it again."""

    seed: int
    steps: int
    batch: int
    sequence: int
    optimizer: str
    learning_rate: float
    fisher_examples: int

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.sequence < 1 or not isfinite(self.learning_rate):
            raise ValueError("recipe is out of range")


@dataclass(frozen=True)
class Provenance:
    """`checkpoints`: digests of the adapter every `checkpoint_every` steps, the first before step 0;
    `software`: (package, version), sorted."""

    data: tuple[DataFile, ...]
    recipe: Recipe
    software: tuple[tuple[str, str], ...]
    checkpoint_every: int
    checkpoints: tuple[Digest, ...]

    def __post_init__(self) -> None:
        for digest in self.checkpoints:
            check_digest(digest, "checkpoint digest")


@dataclass(frozen=True)
class Patch:
    """`adapter` and `fisher` are safetensors blobs: the trained slots, by slot name, and the diagonal Fisher of each.

    loss_before, loss_after: nats per token on the contributor's own held-out part, a claim that nobody has to believe.
    """

    contributor: PeerId
    model: ModelId
    parent: VersionId
    kind: str
    adapter: BlobRef
    fisher: BlobRef
    samples: int
    loss_before: float
    loss_after: float
    licence: str
    provenance: Provenance

    def __post_init__(self) -> None:
        check_peer(self.contributor, "contributor")
        check_digest(self.model, "patch model")
        check_digest(self.parent, "patch parent")
        if self.samples < 1:
            raise ValueError("a patch was trained on at least one sample")
        if not (isfinite(self.loss_before) and isfinite(self.loss_after)):
            raise ValueError("patch losses have to be finite")
