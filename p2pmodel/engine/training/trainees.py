"""What is trained of a patch, on a whole local model, by the patch's kind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.tensors import dense, fish, ia3, lora, weights
from p2pmodel.tensors.kinds import Applier, Trainee
from p2pmodel.tensors.weights import Ground

LEARNING_RATES = {"ia3@1": 5e-3, "fish@1": 2e-3, "lora@1": 2e-3, "dense@1": 5e-4}
"""Where nobody says: the more values are trained, the smaller. scripts/bench/training.py --section kinds tries them."""


@dataclass(frozen=True)
class KindOptions:
    """density: share of the weights that a FISH mask chooses; mask_examples: how many examples the Fisher is of that it
    is chosen by. rank, alpha: of LoRA; the product of its factors is scaled by alpha / rank."""

    density: float = 0.005
    mask_examples: int = 64
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InvalidInput("The density is a share of the weights, between 0 and 1.", "Use 0.005 or 0.025.")
        if self.mask_examples < 1 or self.rank < 1 or not 0 < self.alpha / self.rank <= lora.MAX_SCALE:
            raise InvalidInput("The mask's examples, the rank and alpha have to be positive, and alpha not too large.")


def new_trainee(
    model: PreTrainedModel, kind: str, parent: Mapping[str, Tensor], blocks: Blocks, options: KindOptions, seed: int
) -> Trainee:
    """kind: a name such as `ia3@1`; parent: the state of the version that the patch is against, by slot name; blocks:
    what it is trained on; seed: of whatever is drawn at the beginning.

    It puts its hooks on the model at once, and `remove` takes them away. Raises InvalidInput for a kind that cannot be
    trained here, and for a parent that has no slots of that kind.
    """
    base = model.base_model
    vectors = {name: tensor for name, tensor in parent.items() if name.startswith(ia3.PREFIX)}
    updates = {name: tensor for name, tensor in parent.items() if name.startswith(weights.PREFIX)}
    if kind == "ia3@1" and vectors:
        trainee: Trainee = ia3.Trainee(ia3.Applier(base, sorted(vectors)), vectors, model.device)
        rest = {name: update for name, update in updates.items() if bool(update.any())}
        return _Based(weights.Applier(base, list(rest)), rest, trainee) if rest else trainee
    if kind not in ("fish@1", "dense@1", "lora@1") or not updates:
        raise InvalidInput(
            f"Patches of kind {kind[:64]!r} cannot be trained here.", "See what the model takes: p2pmodel model show"
        )
    on_device = {name: vector.to(model.device) for name, vector in vectors.items()}
    applier = ia3.Applier(base, list(on_device))
    ground = Ground(base, updates)
    if kind == "dense@1":
        trainee = dense.Trainee(ground)
    elif kind == "lora@1":
        trainee = lora.Trainee(ground, lora.targets(base, list(updates)), options.rank, options.alpha, seed)
    else:
        with applier.use(on_device):
            fisher = _data_fisher(model, ground, _drawn(blocks, options.mask_examples, seed))
        trainee = fish.Trainee(ground, fish.choose(fisher, options.density))
    return _Based(applier, on_device, trainee) if on_device else trainee


@dataclass(frozen=True)
class _Based:
    """A trainee on a version that has slots of another prefix too, which stay as they are."""

    applier: Applier
    state: Mapping[str, Tensor]
    trainee: Trainee

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.trainee.parameters

    @contextmanager
    def use(self) -> Iterator[None]:
        with self.applier.use(self.state), self.trainee.use():
            yield

    def adapter(self) -> dict[str, Tensor]:
        return self.trainee.adapter()

    def squared_gradients(self, losses: Callable[[slice], Tensor], rows: int) -> dict[str, Tensor]:
        with self.applier.use(self.state):
            return self.trainee.squared_gradients(losses, rows)

    def remove(self) -> None:
        self.trainee.remove()
        self.applier.remove()


def _drawn(blocks: Blocks, count: int, seed: int) -> Blocks:
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]]


def _data_fisher(model: PreTrainedModel, ground: Ground, examples: Blocks) -> dict[str, Tensor]:
    """By slot, summed over the examples, float32: of the likelihood of the data's own labels."""
    sums = {slot: torch.zeros_like(weight) for slot, weight in ground.weights.items()}
    for gradients in ground.gradients(ground.weights, lambda part: row_nats(model, examples[part]), len(examples)):
        for slot in sums:
            sums[slot] += gradients.pop(slot).square()
    return sums
