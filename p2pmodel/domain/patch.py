"""A patch: an immutable, signed change against exactly one parent version, with what it was trained on."""

from dataclasses import dataclass
from math import isfinite

from p2pmodel.domain.ids import Digest, ModelId, PeerId, VersionId, check_digest, check_peer
from p2pmodel.domain.model import MAX_PLANNED_ROUNDS, BlobRef

MAX_STEPS = 1_000_000
MAX_COUNT = 1 << 20
MAX_FILES = 1024
MAX_CHECKPOINTS = 4096
"""Of one training; a million steps with one every 250."""


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
    """How it was trained: enough to do it again.

    batch: examples in a forward pass; accumulate: of these in a step; sequence: tokens in an example; warm_up: share of
    the steps; clip: the largest norm of a gradient, 0 for any; precision: what the model computed in; early_stopping:
    checkpoints without improvement, 0 for never; validation: share held out; fisher: whose labels it is of, or `adam`;
    control: whether the mean gradient was taken. rounds: trainings that the schedule spans, of which this is number
    `round`, from 0. kind_options: those of the patch's kind, sorted by name. continued: whether the optimiser's moments
    are those of the contributor's training before this one.
    """

    seed: int
    steps: int
    batch: int
    sequence: int
    optimizer: str
    learning_rate: float
    fisher_examples: int
    accumulate: int = 1
    schedule: str = "linear"
    warm_up: float = 0.1
    weight_decay: float = 0.0
    clip: float = 0.0
    precision: str = "fp32"
    early_stopping: int = 0
    validation: float = 0.1
    packing: bool = True
    fisher: str = "model"
    control: bool = False
    held_out_blocks: int = 4
    rounds: int = 1
    round: int = 0
    kind_options: tuple[tuple[str, float], ...] = ()
    continued: bool = False

    def __post_init__(self) -> None:
        counts = (self.batch, self.sequence, self.accumulate, self.fisher_examples, self.held_out_blocks)
        if not 0 <= self.steps <= MAX_STEPS or min(counts) < 1 or max(counts) > MAX_COUNT:
            raise ValueError("recipe is out of range")
        if not 0 <= self.round < self.rounds <= MAX_PLANNED_ROUNDS:
            raise ValueError("recipe is of a round that was not planned")
        if not (0 <= self.seed < 1 << 63 and 0 <= self.early_stopping <= MAX_COUNT):
            raise ValueError("recipe is out of range")
        figures = (self.learning_rate, self.warm_up, self.weight_decay, self.clip, self.validation)
        if not all(isfinite(x) and x >= 0 for x in figures) or max(self.warm_up, self.validation) > 1:
            raise ValueError("recipe is out of range")
        if any(len(text) > 32 for text in (self.optimizer, self.schedule, self.precision, self.fisher)):
            raise ValueError("recipe has a name that is too long")
        names = [name for name, _ in self.kind_options]
        if len(names) > 16 or names != sorted(set(names)) or any(len(name) > 64 for name in names):
            raise ValueError("recipe has options of the kind that are not unique, sorted and few")
        if not all(isfinite(value) for _, value in self.kind_options):
            raise ValueError("recipe has options of the kind that are not finite")


@dataclass(frozen=True)
class Provenance:
    """checkpoints: digests of the adapter every `checkpoint_every` steps, the first before step 0, and after the last
    step; states: of the whole state of the training at the same steps, from which the next ones can be done again.
    chosen: which of the checkpoints the patch's adapter is, where it is rounded to four bits a value.
    software: (package, version), sorted, and what computed: (`cpu`, which), or (`swarm`, codec of the activations);
    threads: how many computed; on all of these the last bits depend. correction: blob of what was added to every
    gradient, where the contributors' control variates were used."""

    data: tuple[DataFile, ...]
    recipe: Recipe
    software: tuple[tuple[str, str], ...]
    checkpoint_every: int
    checkpoints: tuple[Digest, ...]
    states: tuple[Digest, ...] = ()
    validation: tuple[DataFile, ...] = ()
    threads: int = 1
    correction: Digest | None = None
    chosen: Digest | None = None

    def __post_init__(self) -> None:
        if len(self.data) + len(self.validation) > MAX_FILES or len(self.software) > 64:
            raise ValueError("provenance names too many files or packages")
        if any(len(text) > 128 for pair in self.software for text in pair):
            raise ValueError("provenance has a package or version that is too long")
        if not 1 <= self.checkpoint_every <= MAX_STEPS or len(self.checkpoints) > MAX_CHECKPOINTS:
            raise ValueError("provenance has checkpoints out of range")
        if not 1 <= self.threads <= MAX_COUNT or (self.states and len(self.states) != len(self.checkpoints)):
            raise ValueError("provenance has states that are not those of its checkpoints")
        single = (digest for digest in (self.correction, self.chosen) if digest is not None)
        for digest in (*self.checkpoints, *self.states, *single):
            check_digest(digest, "checkpoint digest")

    @property
    def replayable(self) -> bool:
        """Whether the states are named that a segment of the training begins with."""
        return len(self.states) > 1

    def step_of(self, checkpoint: int) -> int:
        """After how many steps the checkpoint was taken."""
        return min(checkpoint * self.checkpoint_every, self.recipe.steps)


@dataclass(frozen=True)
class Patch:
    """`adapter` and `fisher` are safetensors blobs: what was trained, and how much the data depend on it, as the kind
    writes them. `control`: the contributor's mean gradient over the training, in 4 bits, where it is given.

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
    control: BlobRef | None = None

    def __post_init__(self) -> None:
        check_peer(self.contributor, "contributor")
        check_digest(self.model, "patch model")
        check_digest(self.parent, "patch parent")
        if len(self.kind) > 64 or len(self.licence) > 128:
            raise ValueError("patch has a kind or licence that is too long")
        if self.samples < 1:
            raise ValueError("a patch was trained on at least one sample")
        if not (isfinite(self.loss_before) and isfinite(self.loss_after)):
            raise ValueError("patch losses have to be finite")

    @property
    def checkpoint(self) -> Digest:
        """Which of the training's the adapter is, before any rounding."""
        return self.provenance.chosen or self.adapter.digest

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """Adapter, Fisher, and the control variate where there is one."""
        return (self.adapter, self.fisher) if self.control is None else (self.adapter, self.fisher, self.control)
