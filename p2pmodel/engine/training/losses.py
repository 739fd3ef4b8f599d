"""Losses of blocks of tokens, by whatever model is called as transformers' are."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data import IGNORED, Blocks
from p2pmodel.tensors.fisher import sample_labels


def row_nats(model: PreTrainedModel, blocks: Blocks) -> Tensor:
    """[B] float32: the nats of each block, summed over the tokens that have labels."""
    logits = _logits(model, blocks)
    labels = blocks.labels.to(logits.device)
    nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view(len(blocks), -1).sum(1)


def row_nats_of_samples(model: PreTrainedModel, blocks: Blocks, seeds: list[int]) -> Tensor:
    """As `row_nats`, for labels drawn from the model itself, where there are any; a seed a block, so that what is drawn
    does not depend on how many blocks go together. Raises InvalidInput where its probabilities are no numbers."""
    logits = _logits(model, blocks)
    if not bool(logits.detach().amax(-1).isfinite().all()):  # a word that is never said has -inf
        raise InvalidInput(
            "The model's probabilities are no numbers.", "Use a lower learning rate, or look at the data."
        )
    drawn = [
        sample_labels(row, torch.Generator().manual_seed(seed))
        for row, seed in zip(logits.detach().cpu(), seeds, strict=True)
    ]
    labels = torch.where(blocks.labels == IGNORED, IGNORED, torch.stack(drawn)).to(logits.device)
    nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view(len(blocks), -1).sum(1)


def _logits(model: PreTrainedModel, blocks: Blocks) -> Tensor:
    logits: Tensor = model(input_ids=blocks.ids[:, :-1].to(model.device), use_cache=False).logits
    return logits.float()
