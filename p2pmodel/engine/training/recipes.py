"""How a patch is trained: every option that its bytes depend on, apart from the data and the kind."""

import math
from dataclasses import dataclass

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.model import MAX_PLANNED_ROUNDS
from p2pmodel.domain.patch import MAX_CHECKPOINTS, MAX_STEPS
from p2pmodel.engine.training.schedule import SCHEDULES

PRECISIONS = ("fp32", "bf16")
FISHERS = ("model", "data", "adam")


@dataclass(frozen=True)
class TrainingOptions:
    """batch: examples in a forward pass; accumulate: of these in a step. sequence: tokens in an example. warm_up: share
    of the steps. weight_decay: pull towards the parent's values. clip: the largest norm of a gradient; 0 for any.
    precision: what the model computes in; parameters and losses are float32. early_stopping: end after so many
    checkpoints without improvement; 0 for never. validation: share that is held out; held_out_blocks: how many of these
    are used, at most; each checkpoint costs a forward pass over them. checkpoint_every: steps. rounds: trainings of as
    many steps that the schedule spans; this is number `round` of them, from 0.

    fisher: of the squared gradients of `fisher_examples` examples, with labels drawn from the `model` or those of the
    `data`; or from the second moments of `adam`, which takes no pass of its own. control: whether the mean gradient is
    taken too."""

    steps: int = 60
    batch: int = 4
    sequence: int = 512
    learning_rate: float = 5e-3
    seed: int = 0
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
    fisher_examples: int = 32
    control: bool = False
    checkpoint_every: int = 20
    held_out_blocks: int = 4
    rounds: int = 1
    round: int = 0

    def __post_init__(self) -> None:
        counts = (self.batch, self.accumulate, self.sequence, self.fisher_examples, self.checkpoint_every)
        if not 1 <= self.steps <= MAX_STEPS or min(*counts, self.held_out_blocks) < 1:
            raise InvalidInput(f"A training has 1 to {MAX_STEPS} steps, and its batch, sequence, counts are positive.")
        if self.steps // self.checkpoint_every > MAX_CHECKPOINTS - 2:
            raise InvalidInput(f"A training has at most {MAX_CHECKPOINTS} checkpoints.", "Raise --checkpoint-every.")
        if not 0 <= self.round < self.rounds <= MAX_PLANNED_ROUNDS:
            raise InvalidInput(f"Round {self.round} is none of {self.rounds} that a schedule spans.")
        if not 0 <= self.seed < 1 << 63 or self.early_stopping < 0:
            raise InvalidInput("The seed and the checkpoints of early stopping cannot be negative.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidInput("The learning rate has to be a positive number.")
        if not (0 <= self.warm_up <= 1 and 0 < self.validation < 1):
            raise InvalidInput("The warm-up and the part held out for validation are shares, below 1.")
        if not all(math.isfinite(x) and x >= 0 for x in (self.weight_decay, self.clip)):
            raise InvalidInput("Weight decay and clipping have to be numbers that are not negative.")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("fisher", FISHERS)):
            if getattr(self, name) not in known:
                raise InvalidInput(f"{getattr(self, name)!r} is no {name}.", f"Use {', '.join(known)}.")
