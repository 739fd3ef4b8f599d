"""Training a patch on the whole model: the base is frozen, the slots' tensors are learned from the parent's state.

Adam (Kingma & Ba, 2015) with a warm-up and a linear decay to a tenth of the rate. The loss on the held-out blocks is
taken at every checkpoint, and the best state seen is what comes out, so that a patch never makes its own data worse.
All depends on the inputs and the seed alone, on one machine with one number of threads.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest
from p2pmodel.engine.evaluation import attached, token_nats
from p2pmodel.tensors.blob import pack
from p2pmodel.tensors.fisher import diagonal_fisher, sample_labels
from p2pmodel.tensors.kinds import Applier, PatchKind
from p2pmodel.wire.canonical import digest

OPTIMIZER = "adam"
WARM_UP, FINAL_RATE = 0.1, 0.1
"""Share of the steps that the warm-up takes, and of the learning rate that is left at the end."""


@dataclass(frozen=True)
class TrainingOptions:
    """sequence: tokens in an example; fisher_examples: how many the Fisher is the mean of; checkpoint_every: steps.
    held_out_blocks: how many of them are used, at most; each checkpoint costs a forward pass over them."""

    steps: int = 60
    batch: int = 4
    sequence: int = 512
    learning_rate: float = 5e-3
    seed: int = 0
    fisher_examples: int = 32
    checkpoint_every: int = 20
    held_out_blocks: int = 4

    def __post_init__(self) -> None:
        counts = (self.batch, self.sequence, self.fisher_examples, self.checkpoint_every, self.held_out_blocks)
        if self.steps < 1 or min(counts) < 1 or self.seed < 0:
            raise InvalidInput("The training's steps, batch, sequence, seed and counts have to be positive.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidInput("The learning rate has to be a positive number.")


@dataclass(frozen=True)
class Trained:
    """adapter, fisher: float32 by slot name. samples: examples seen. loss_before, loss_after: nats per token on the
    held-out blocks. checkpoints: digests of the packed adapter every `checkpoint_every` steps, the first before step 0.
    """

    adapter: dict[str, Tensor]
    fisher: dict[str, Tensor]
    samples: int
    loss_before: float
    loss_after: float
    checkpoints: tuple[Digest, ...]


def train(
    model: PreTrainedModel,
    kind: PatchKind,
    parent: Mapping[str, Tensor],
    train_blocks: Tensor,
    held_out_blocks: Tensor,
    options: TrainingOptions,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """`parent`: the state of the version that the patch is against, by slot name; train_blocks, held_out_blocks:
    [N, sequence + 1] int64. `on_step` gets the number of finished steps and the batch's loss in nats per token.

    The model's parameters and hooks are afterwards what they were. Raises InvalidInput when the loss is not finite.
    """
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.train(False)
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with attached(model, kind, parent) as applier:
            held_out = held_out_blocks[: options.held_out_blocks]
            return _train(model, applier, parent, train_blocks, held_out, options, on_step)
    finally:
        model.train(training)
        for parameter, required in frozen:
            parameter.requires_grad_(required)


def _train(
    model: PreTrainedModel,
    applier: Applier,
    parent: Mapping[str, Tensor],
    train_blocks: Tensor,
    held_out: Tensor,
    options: TrainingOptions,
    on_step: Callable[[int, float], None],
) -> Trained:
    device = model.device
    state = {n: t.detach().to(device, torch.float32).clone().requires_grad_(True) for n, t in sorted(parent.items())}
    optimizer = torch.optim.Adam(state.values(), lr=options.learning_rate, betas=(0.9, 0.95))
    order = _batches(train_blocks, options)
    before = best_loss = _held_out_loss(model, applier, state, held_out, options.batch)
    best = _copy(state)
    checkpoints = [digest(pack(best))]
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(step, options.steps)
        with torch.enable_grad(), applier.use(state):
            loss = token_nats(model, next(order).to(device)).mean()
        value = _finite(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, value)
        if (step + 1) % options.checkpoint_every == 0:
            checkpoints.append(digest(pack(_copy(state))))
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            after = _held_out_loss(model, applier, state, held_out, options.batch)
            if after < best_loss:
                best_loss, best = after, _copy(state)
    fisher = _fisher(model, applier, best, train_blocks, options)
    return Trained(best, fisher, options.steps * options.batch, before, best_loss, tuple(checkpoints))


def _fisher(
    model: PreTrainedModel,
    applier: Applier,
    state: Mapping[str, Tensor],
    train_blocks: Tensor,
    options: TrainingOptions,
) -> dict[str, Tensor]:
    """Of the log-likelihood of whole examples, labels sampled from the model."""
    generator = torch.Generator().manual_seed(options.seed)
    chosen = train_blocks[torch.randperm(len(train_blocks), generator=generator)[: options.fisher_examples]]

    def row_losses(rows: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        with applier.use(rows):
            logits = model(input_ids=ids[:, :-1].to(model.device), use_cache=False).logits.float()
        labels = sample_labels(logits.cpu(), generator).to(logits.device)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)

    on_device = {name: tensor.to(model.device) for name, tensor in state.items()}
    fisher = diagonal_fisher(row_losses, on_device, torch.split(chosen, options.batch))
    return {name: tensor.cpu() for name, tensor in fisher.items()}


@torch.no_grad()
def _held_out_loss(
    model: PreTrainedModel, applier: Applier, state: Mapping[str, Tensor], held_out: Tensor, batch: int
) -> float:
    total = 0.0
    with applier.use(state):
        for ids in torch.split(held_out, batch):
            total += float(token_nats(model, ids.to(model.device)).double().sum())
    return _finite(total / (len(held_out) * (held_out.shape[1] - 1)))


def _batches(blocks: Tensor, options: TrainingOptions) -> Iterator[Tensor]:
    """Epoch after epoch in a new order; a batch may reach into the next epoch."""
    generator = torch.Generator().manual_seed(options.seed)
    rows = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rows) < options.batch:
            rows = torch.cat([rows, torch.randperm(len(blocks), generator=generator)])
        yield blocks[rows[: options.batch]]
        rows = rows[options.batch :]


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, round(steps * WARM_UP))
    if step < warm_up:
        return (step + 1) / warm_up
    return 1 - (1 - FINAL_RATE) * (step + 1 - warm_up) / max(1, steps - warm_up)


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.float32).clone() for name, tensor in state.items()}


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise InvalidInput("The training's loss is not finite.", "Use a lower learning rate, or look at the data.")
    return loss
