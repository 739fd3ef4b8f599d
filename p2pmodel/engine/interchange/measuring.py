"""How much data depend on values that were trained elsewhere: the Fisher of an adapter that came without one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.engine.data import Parts
from p2pmodel.engine.training.loop import frozen
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.sensitivity import fisher_of
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.tensors import lora
from p2pmodel.tensors.changes import Places
from p2pmodel.tensors.patch_kind import KindOptions, Trainee


@dataclass(frozen=True)
class Measured:
    """fisher: by the names of a Fisher blob, float32; losses on the held-out blocks, in nats per token."""

    fisher: dict[str, Tensor]
    loss_before: float
    loss_after: float


def measure(
    model: PreTrainedModel,
    kind: str,
    parent: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    places: Places,
    parts: Parts,
    options: TrainingOptions,
) -> Measured:
    """adapter: what the blob of an `ia3@1` or a `lora@1` patch holds; places: of its Fisher. Raises InvalidInput."""
    rank = max((t.shape[0] for name, t in adapter.items() if name.endswith(lora.A)), default=1)
    scale = float(adapter[lora.SCALE]) if lora.SCALE in adapter else 1.0
    trainee = new_trainee(model, kind, parent, parts.train, KindOptions(rank=rank, alpha=scale * rank), options.seed)
    try:
        with frozen(model, trainee):
            before = _loss(model, trainee, parts, options)
            with torch.no_grad():
                for name, parameter in trainee.parameters.items():
                    if name in adapter:
                        parameter.copy_(_filled(adapter[name], parameter))
            found = fisher_of(model, trainee, {}, parts.train, options)
            return Measured({name: found[name] for name, _ in places}, before, _loss(model, trainee, parts, options))
    finally:
        trainee.remove()


def _filled(values: Tensor, like: Tensor) -> Tensor:
    """With zeros up to the shape of `like`."""
    if values.ndim < 2:
        return values
    rows, columns = (wanted - has for wanted, has in zip(like.shape, values.shape, strict=True))
    return torch.nn.functional.pad(values, (0, columns, 0, rows))


@torch.no_grad()
def _loss(model: PreTrainedModel, trainee: Trainee, parts: Parts, options: TrainingOptions) -> float:
    held_out, total = parts.held_out[: options.held_out_blocks], 0.0
    with trainee.use():
        for at in range(0, len(held_out), options.batch):
            total += float(row_nats(model, held_out[at : at + options.batch]).double().sum())
    return total / held_out.tokens
