"""Training a patch: the base is frozen, a trainee's parameters are learned from the parent's values on.

The loss on the held-out blocks is taken at every checkpoint, and the best state seen is what comes out, so that a patch
never makes its own data worse. All depends on the inputs and the seed alone, on one machine with one number of threads:
a training that was killed and goes on from what its keeper has ends in the same bytes, and so does a segment from one
checkpoint to the next that somebody else replays.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.engine.training.optimising import NAME as OPTIMIZER
from p2pmodel.engine.training.optimising import Optimiser
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.resuming import Keeper, MemoryKeeper, Progress, best_of
from p2pmodel.engine.training.schedule import rate
from p2pmodel.engine.training.sensitivity import fisher_of
from p2pmodel.tensors import blob
from p2pmodel.tensors.patch_kind import Trainee

__all__ = ["OPTIMIZER", "Run", "Step", "Trained", "TrainingOptions", "frozen", "train"]

SAVE_SECONDS = 60.0
"""A training whose checkpoints are farther apart than this is noted between them."""


@dataclass(frozen=True)
class Step:
    """`number` steps are finished. loss: of the step's examples; held_out: of the held-out blocks, after a step that is
    a checkpoint; both in nats per token. tokens: that the step learned from. resumed: an earlier process did it."""

    number: int
    loss: float
    tokens: int
    held_out: float | None = None
    resumed: bool = False


@dataclass(frozen=True)
class Trained:
    """adapter: as the patch's blob has it. fisher: by the names that the kind gives it, float32. control: the mean
    gradient over the steps by parameter, float32, where it was asked for.

    samples, tokens: seen in all. loss_before, loss_after: nats per token on the held-out blocks. losses: of every step.
    checkpoints: digests of the packed adapter every `checkpoint_every` steps, the first before step 0, and after the
    last step; states: of the optimiser's blob at the same steps; held_out: the loss there; best: which of them the
    adapter is. final_state: the optimiser's blob after the last step."""

    adapter: dict[str, Tensor]
    fisher: dict[str, Tensor]
    control: dict[str, Tensor] | None
    samples: int
    tokens: int
    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    checkpoints: tuple[Digest, ...]
    states: tuple[Digest, ...]
    held_out: tuple[float, ...]
    best: int
    final_state: bytes


def train(
    model: PreTrainedModel,
    trainee: Trainee,
    train_blocks: Blocks,
    held_out_blocks: Blocks,
    options: TrainingOptions,
    on_step: Callable[[Step], None] = lambda step: None,
    *,
    keeper: Keeper | None = None,
    moments: bytes | None = None,
    correction: Mapping[str, Tensor] | None = None,
) -> Trained:
    """`model` is called as transformers' causal models are, and `trainee` changes what it computes.

    on_step: told of each step; at first of those that the keeper has, if any. moments: an optimiser's blob of these
    parameters, whose moments this training begins with. correction: added to every gradient, by parameter: the mean
    of the contributors' mean gradients less one's own (SCAFFOLD: Karimireddy et al., 2020, arXiv:1910.06378).

    The model's parameters are afterwards what they were. Raises InvalidInput when the loss is not finite.
    """
    with frozen(model, trainee):
        run = Run(model, trainee, train_blocks, held_out_blocks[: options.held_out_blocks], options, correction or {})
        return run.train(keeper or MemoryKeeper(), moments, on_step)


class Run:
    """One training under way, with the trainee's parameters as they are at the moment."""

    def __init__(
        self,
        model: PreTrainedModel,
        trainee: Trainee,
        train_blocks: Blocks,
        held_out: Blocks,
        options: TrainingOptions,
        correction: Mapping[str, Tensor],
    ) -> None:
        self.model, self.trainee, self.options = model, trainee, options
        self.blocks, self.held_out, self.correction = train_blocks, held_out, correction
        self.losses: list[float] = []
        self.tokens = 0
        self.checkpoints: list[Digest] = []
        self.states: list[Digest] = []
        self.held_out_losses: list[float] = []
        self.optimiser = Optimiser(trainee.parameters, options.weight_decay, options.clip)
        self.sums: dict[str, Tensor] | None = None
        if options.control:
            self.sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self.optimiser.parameters.items()}

    def train(self, keeper: Keeper, moments: bytes | None, on_step: Callable[[Step], None]) -> Trained:
        options, done = self.options, 0
        if (progress := keeper.found()) is not None:
            self._restore(keeper, progress)
            done = progress.step
            for number, loss in enumerate(progress.losses, 1):
                on_step(Step(number, loss, 0, resumed=True))
        else:
            if moments is not None:
                self.optimiser.load(moments, parameters=False)
            self._checkpoint(keeper)
        saved = time.monotonic()
        for number, batch in self.batches(done):
            if number == options.steps or 0 < options.early_stopping <= self._stale():
                break
            loss, tokens = self.step(number, batch)
            self.losses.append(loss)
            self.tokens += tokens
            at_checkpoint = (number + 1) % options.checkpoint_every == 0 or number + 1 == options.steps
            if at_checkpoint:
                self._checkpoint(keeper)
            elif time.monotonic() > saved + SAVE_SECONDS:
                self._note(keeper, keeper.keep(self.optimiser.save()))
            else:
                on_step(Step(number + 1, loss, tokens))
                continue
            saved = time.monotonic()
            on_step(Step(number + 1, loss, tokens, self.held_out_losses[-1] if at_checkpoint else None))
        return self._finish(keeper)

    def step(self, number: int, batch: Blocks) -> tuple[float, int]:
        """The step after `number` finished ones: its loss, and how many tokens it learned from."""
        loss, tokens = self.gradients(batch)
        if self.sums is not None:
            for name, gradient in self.optimiser.gradients().items():
                self.sums[name] += gradient
        options = self.options
        at, of = options.round * options.steps + number, options.rounds * options.steps
        share = rate(options.schedule, at, of, options.warm_up)
        self.optimiser.step(options.learning_rate * share, self.correction)
        return _finite(loss), tokens

    def gradients(self, batch: Blocks) -> tuple[float, int]:
        """Of the mean over all tokens of the batch, however many forward passes it is cut into."""
        tokens, loss = batch.tokens, 0.0
        for at in range(0, len(batch), self.options.batch):
            part = batch[at : at + self.options.batch]
            with torch.enable_grad(), self.computing(), self.trainee.use():
                share = row_nats(self.model, part).sum() / tokens
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.item()
        return loss, tokens

    @torch.no_grad()
    def held_out_loss(self) -> float:
        total = 0.0
        with self.computing(), self.trainee.use():
            for at in range(0, len(self.held_out), self.options.batch):
                part = self.held_out[at : at + self.options.batch]
                total += float(row_nats(self.model, part).double().sum())
        return _finite(total / self.held_out.tokens)

    def batches(self, finished: int) -> Iterator[tuple[int, Blocks]]:
        """(finished steps, the next one's examples), epoch after epoch in a new order; a step may reach into the next
        epoch."""
        generator = torch.Generator().manual_seed(self.options.seed)
        rows = torch.empty(0, dtype=torch.int64)
        size, number = self.options.batch * self.options.accumulate, 0
        while True:
            while len(rows) < size:
                rows = torch.cat([rows, torch.randperm(len(self.blocks), generator=generator)])
            if number >= finished:
                yield number, self.blocks[rows[:size]]
            rows, number = rows[size:], number + 1

    def computing(self) -> torch.autocast:
        """Within: the model computes in the precision that was asked for."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _checkpoint(self, keeper: Keeper) -> None:
        state = keeper.keep(self.optimiser.save())
        self.checkpoints.append(keeper.keep(blob.pack(self.trainee.adapter())))
        self.states.append(state)
        self.held_out_losses.append(self.held_out_loss())
        self._note(keeper, state)

    def _note(self, keeper: Keeper, state: Digest) -> None:
        sums = None if self.sums is None else keeper.keep(blob.pack(self.sums))
        keeper.note(
            Progress(
                len(self.losses),
                state,
                sums,
                tuple(self.checkpoints),
                tuple(self.states),
                tuple(self.held_out_losses),
                tuple(self.losses),
                self.tokens,
            )
        )

    def _restore(self, keeper: Keeper, progress: Progress) -> None:
        self.optimiser.load(keeper.load(progress.state))
        if self.sums is not None and progress.gradients is not None:
            raw = keeper.load(progress.gradients)
            for name, total in blob.unpack(raw, None, len(raw)).items():
                self.sums[name].copy_(total)
        self.checkpoints, self.states = list(progress.checkpoints), list(progress.states)
        self.held_out_losses, self.losses = list(progress.held_out), list(progress.losses)
        self.tokens = progress.tokens

    def _stale(self) -> int:
        """Checkpoints since the best one."""
        return len(self.held_out_losses) - 1 - best_of(self.held_out_losses)

    def _finish(self, keeper: Keeper) -> Trained:
        best, steps = best_of(self.held_out_losses), len(self.losses)
        final, moments = self.optimiser.save(), self.optimiser.second_moments()
        self.optimiser.load(keeper.load(self.states[best]), moments=False)
        adapter = self.trainee.adapter()
        with self.computing():
            fisher = fisher_of(self.model, self.trainee, moments, self.blocks, self.options)
        return Trained(
            adapter=adapter,
            fisher=fisher,
            control=None if self.sums is None else {n: (t / max(1, steps)).float().cpu() for n, t in self.sums.items()},
            samples=steps * self.options.batch * self.options.accumulate,
            tokens=self.tokens,
            loss_before=self.held_out_losses[0],
            loss_after=self.held_out_losses[best],
            losses=tuple(self.losses),
            checkpoints=tuple(self.checkpoints),
            states=tuple(self.states),
            held_out=tuple(self.held_out_losses),
            best=best,
            final_state=final,
        )


@contextmanager
def frozen(model: PreTrainedModel, trainee: Trainee) -> Iterator[None]:
    """Within: nothing of the model is trained; afterwards it is what it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.train(False)
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter, required in before:
            parameter.requires_grad_(required)
        for leaf in trainee.parameters.values():
            leaf.grad = None


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise InvalidInput("The training's loss is not finite.", "Use a lower learning rate, or look at the data.")
    return loss
