"""The diagonal Fisher information: the mean over examples of squared per-example gradients.

It is never the square of a batch's mean gradient, which is smaller by about the batch size and measures something else.
For merging, labels are sampled from the model itself (Matena & Raffel, 2022, arXiv:2111.09832, section 2).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

RowLosses = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(state with one row per example: {slot: [B, *shape]}, examples [B, …]) -> [B]; row b depends on row b of all only."""


def diagonal_fisher(row_losses: RowLosses, state: Mapping[str, Tensor], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """{slot: [*shape] float32}, mean over all examples of all batches [B, …].

    Every example of a batch gets its own copy of the state, so that one backward pass yields the gradient of each
    alone; exact for any model that applies the state per row. Raises ValueError when there are no examples.
    """
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
    examples = 0
    for batch in batches:
        rows = {n: t.detach().expand(len(batch), *t.shape).clone().requires_grad_(True) for n, t in state.items()}
        with torch.enable_grad():
            loss = row_losses(rows, batch).sum()
        gradients = torch.autograd.grad(loss, list(rows.values()), allow_unused=True)
        for name, gradient in zip(rows, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.to(torch.float64).square().sum(0)
        examples += len(batch)
    if examples == 0:
        raise ValueError("the Fisher information needs at least one example")
    return {name: (total / examples).to(torch.float32) for name, total in sums.items()}


def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per position from the model's own distribution: [..., V] float -> [...] int64, no gradient."""
    probabilities = torch.softmax(logits.detach().float(), -1)
    flat = torch.multinomial(probabilities.reshape(-1, probabilities.shape[-1]), 1, generator=generator)
    return flat.view(logits.shape[:-1])
