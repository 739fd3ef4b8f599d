"""How long a training takes, from a few steps that change nothing."""

import time
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.loop import Run, frozen
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.sensitivity import fisher_of
from p2pmodel.tensors.patch_kind import Trainee

STEPS = 2


@dataclass(frozen=True)
class Pace:
    """step, held_out, example: seconds of a step, of the loss on what is held out, and of the Fisher of one example;
    tokens: that a step learns from. values: how many are trained. adapter, fisher: tensors as a patch would have them.
    """

    step: float
    held_out: float
    example: float
    tokens: float
    values: int
    adapter: dict[str, Tensor]
    fisher: dict[str, Tensor]

    def total(self, options: TrainingOptions) -> float:
        """Seconds of the whole training."""
        checkpoints = 1 + -(-options.steps // options.checkpoint_every)
        return self.step * options.steps + self.held_out * checkpoints + self.example * options.fisher_examples


def measure(
    model: PreTrainedModel, trainee: Trainee, train_blocks: Blocks, held_out_blocks: Blocks, options: TrainingOptions
) -> Pace:
    """From STEPS steps, after one that warms up."""
    with frozen(model, trainee):
        run = Run(model, trainee, train_blocks, held_out_blocks[: options.held_out_blocks], options, {})
        seconds, tokens = 0.0, 0
        for number, batch in islice(run.batches(0), 1 + STEPS):
            began = time.perf_counter()
            learned = run.gradients(batch)[1]
            if number:
                seconds += time.perf_counter() - began
                tokens += learned
            run.optimiser.forget_gradients()
        began = time.perf_counter()
        run.held_out_loss()
        held_out = time.perf_counter() - began
        few = replace(options, fisher_examples=min(options.batch, options.fisher_examples))
        began = time.perf_counter()
        with run.computing():
            fisher = fisher_of(model, trainee, run.optimiser.second_moments(), train_blocks, few)
        example = (time.perf_counter() - began) / min(few.fisher_examples, len(train_blocks))
        return Pace(
            seconds / STEPS,
            held_out,
            0.0 if options.fisher == "adam" else example,
            tokens / STEPS,
            sum(leaf.numel() for leaf in trainee.parameters.values()),
            trainee.adapter(),
            fisher,
        )
