"""How much the losses of examples depend on what was trained: the diagonal Fisher that a patch carries."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.losses import row_nats, row_nats_of_samples
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.tensors.patch_kind import Trainee


def fisher_of(
    model: PreTrainedModel, trainee: Trainee, moments: Mapping[str, Tensor], blocks: Blocks, options: TrainingOptions
) -> dict[str, Tensor]:
    """float32, of `options.fisher_examples` blocks drawn by the seed: the mean of the squared gradients of each one's
    log-likelihood. moments: the mean squared gradients that Adam has seen, by parameter, for `adam`."""
    if options.fisher == "adam":
        return {name: moment.sqrt().cpu() for name, moment in moments.items()}
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(blocks), generator=generator)[: options.fisher_examples].tolist()
    sums: dict[str, Tensor] = {}
    for at in range(0, len(chosen), options.batch):
        rows = chosen[at : at + options.batch]
        part = blocks[torch.tensor(rows)]

        def losses(some: slice, rows: list[int] = rows, part: Blocks = part) -> Tensor:
            if options.fisher == "data":
                return row_nats(model, part[some])
            return row_nats_of_samples(model, part[some], [options.seed ^ (row + 1) << 20 for row in rows[some]])

        for name, total in trainee.squared_gradients(losses, len(rows)).items():
            sums[name] = sums[name] + total if name in sums else total
    return {name: (total / len(chosen)).to(torch.float32) for name, total in sums.items()}
