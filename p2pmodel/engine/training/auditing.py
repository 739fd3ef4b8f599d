"""A part of a training done again, from the state that it is said to have begun in."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.loop import Run, frozen
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.tensors import blob
from p2pmodel.tensors.patch_kind import Trainee


@dataclass(frozen=True)
class Replayed:
    """Blobs of the adapter before and after, and of the optimiser after: what the training names the digests of."""

    before: bytes
    after: bytes
    state: bytes


def replay_segment(
    model: PreTrainedModel,
    trainee: Trainee,
    blocks: Blocks,
    options: TrainingOptions,
    state: bytes,
    steps: range,
    correction: Mapping[str, Tensor] | None = None,
) -> Replayed:
    """state: the optimiser's blob after `steps.start` steps. trainee: one as the training began with, and so it is left
    too, since weight decay pulls towards that. Raises InvalidInput for a state or a correction that is of something
    else, and for what leads to no finite loss."""
    if correction and not shapes_of(correction).items() <= shapes_of(trainee.parameters).items():
        raise InvalidInput("The correction is of other parameters than are trained.")
    began = {name: leaf.detach().clone() for name, leaf in trainee.parameters.items()}
    try:
        with frozen(model, trainee):
            run = Run(model, trainee, blocks, blocks[:0], options, correction or {})
            run.optimiser.load(state)
            before = blob.pack(trainee.adapter())
            for number, batch in islice(run.batches(steps.start), len(steps)):
                run.step(number, batch)
            return Replayed(before, blob.pack(trainee.adapter()), run.optimiser.save())
    finally:
        with torch.no_grad():
            for name, leaf in trainee.parameters.items():
                leaf.copy_(began[name])


def distance(claimed: bytes, found: bytes, before: bytes) -> float:
    """How far two adapters are from each other, as a share of how far the training went from `before` on; infinite for
    adapters of different things."""
    a, b, start = (blob.unpack(raw, None, len(raw)) for raw in (claimed, found, before))
    if not shapes_of(a) == shapes_of(b) == shapes_of(start):
        return float("inf")
    apart, moved = _norm(a, b), _norm(a, start)
    if not (isfinite(apart) and isfinite(moved)):
        return float("inf")
    return apart / moved if moved else (float("inf") if apart else 0.0)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _norm(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    parts = [(a[name].double() - b[name].double()).square().sum() for name in a]
    return float(torch.stack(parts).sum().sqrt()) if parts else 0.0
