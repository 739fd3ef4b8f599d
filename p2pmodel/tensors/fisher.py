"""Labels for the diagonal Fisher information: the mean over examples of squared per-example gradients.

It is never the square of a batch's mean gradient, which is smaller by about the batch size and measures something else;
`patch_kind.Trainee.squared_gradients` gives those of every example alone. For merging, labels are sampled from the
model itself (Matena & Raffel, 2022, arXiv:2111.09832, section 2); for FISH masks they are the data's (Sung et al.,
2021).
"""

import torch
from torch import Tensor


def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per position from the model's own distribution: [..., V] float -> [...] int64, no gradient."""
    probabilities = torch.softmax(logits.detach().float(), -1)
    flat = torch.multinomial(probabilities.reshape(-1, probabilities.shape[-1]), 1, generator=generator)
    return flat.view(logits.shape[:-1])
