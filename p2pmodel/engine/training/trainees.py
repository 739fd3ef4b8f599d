"""What is trained of a patch, on a whole local model, by the patch's kind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain import modular
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.gates import fit_gates, gate_slots
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.tensors import dense, experts, fish, ia3, lora, weights
from p2pmodel.tensors.kinds import Applier, Kinds, Trainee
from p2pmodel.tensors.weights import Ground

LEARNING_RATES = {"ia3@1": 5e-3, "fish@1": 2e-3, "lora@1": 2e-3, "dense@1": 5e-4, "expert@1": 2e-3}
"""Where nobody says: the more values are trained, the smaller. scripts/bench/training.py --section kinds tries them."""


OF_PREFIX = {"dense@1": weights.PREFIX, "ia3@1": ia3.PREFIX, modular.KIND: modular.PREFIX}
"""A kind for each prefix of slots."""


@dataclass(frozen=True)
class KindOptions:
    """density: share of the weights that a FISH mask chooses; mask_examples: how many examples the Fisher is of that it
    is chosen by. rank, alpha: of LoRA; the product of its factors is scaled by alpha / rank. expert: the name of the
    one that is trained, of that rank where it is new; router: train the rows of all experts instead, and no adapter."""

    density: float = 0.005
    mask_examples: int = 64
    rank: int = 8
    alpha: float = 16.0
    expert: str = ""
    router: bool = False

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
    if kind == modular.KIND:
        return _expert_trainee(model, parent, blocks, options, seed)
    vectors = {name: tensor for name, tensor in parent.items() if name.startswith(ia3.PREFIX)}
    updates = {name: tensor for name, tensor in parent.items() if name.startswith(weights.PREFIX)}
    if kind == "ia3@1" and vectors:
        trainee: Trainee = ia3.Trainee(ia3.Applier(base, sorted(vectors)), vectors, model.device)
        return _based(model, parent, ia3.PREFIX, trainee)
    if kind not in ("fish@1", "dense@1", "lora@1") or not updates:
        raise InvalidInput(
            f"Patches of kind {kind[:64]!r} cannot be trained here.", "See what the model takes: p2pmodel model show"
        )
    ground = Ground(base, updates)
    if kind == "dense@1":
        trainee = dense.Trainee(ground)
    elif kind == "lora@1":
        trainee = lora.Trainee(ground, lora.targets(base, list(updates)), options.rank, options.alpha, seed)
    else:
        with _applied(model, parent, weights.PREFIX):
            fisher = _data_fisher(model, ground, _drawn(blocks, options.mask_examples, seed))
        trainee = fish.Trainee(ground, fish.choose(fisher, options.density))
    return _based(model, parent, weights.PREFIX, trainee)


def _expert_trainee(
    model: PreTrainedModel, parent: Mapping[str, Tensor], blocks: Blocks, options: KindOptions, seed: int
) -> Trainee:
    """A new expert is trained behind a row that is found first; one that is there keeps its row."""
    state = {name: tensor for name, tensor in parent.items() if name.startswith(modular.PREFIX)}
    known = {expert.name for expert in modular.experts_in({name: tuple(t.shape) for name, t in state.items()})}
    brought: dict[str, Tensor] = {}
    if options.router:
        trained = {name: state[name] for name in experts.routing_slots(list(state))}
        if not trained:
            raise InvalidInput("The version has no experts whose rows could be trained.", "Train an expert first.")
    elif options.expert in known:
        places = {name: modular.place_of(name) for name in state}
        own = [n for n, place in places.items() if place is not None and place.expert == options.expert]
        trained = {name: state[name] for name in own if name not in experts.routing_slots(own)}
    else:
        if not modular.is_name(options.expert):
            raise InvalidInput(
                f"{options.expert[:64]!r} is no name for an expert.",
                "Use 1 to 32 small letters, digits, '-' and '_': --expert NAME",
            )
        pools = experts.find_pools(model.base_model)
        if options.rank > modular.max_rank(pools[0]):
            raise InvalidInput(
                f"An expert of rank {options.rank} is larger than the model takes.",
                f"Use --rank {modular.max_rank(pools[0])} or less.",
            )
        trained = experts.new_adapter(pools, modular.Expert(options.expert, options.rank))
        layers = [pool.name.removeprefix(modular.PREFIX).removesuffix(".experts") for pool in pools]
        with _applied(model, parent, modular.PREFIX):
            brought = gate_slots(fit_gates(model, blocks, layers, seed), options.expert)
    return _based(
        model, parent, modular.PREFIX, experts.Trainee(model.base_model, state, trained, brought, model.device)
    )


def _rest(
    model: PreTrainedModel, parent: Mapping[str, Tensor], prefix: str
) -> tuple[Applier | None, dict[str, Tensor]]:
    """What runs the model at the parent's slots of other prefixes, where they change anything."""
    others = {name: tensor for name, tensor in parent.items() if not name.startswith(prefix)}
    rest = {n: t.to(model.device) for n, t in others.items() if not n.startswith(weights.PREFIX) or bool(t.any())}
    kinds = [kind for kind, own in OF_PREFIX.items() if any(name.startswith(own) for name in rest)]
    return (Kinds(kinds).applier(model.base_model, sorted(rest)) if kinds else None), rest


def _based(model: PreTrainedModel, parent: Mapping[str, Tensor], prefix: str, trainee: Trainee) -> Trainee:
    applier, rest = _rest(model, parent, prefix)
    return trainee if applier is None else _Based(applier, rest, trainee)


@contextmanager
def _applied(model: PreTrainedModel, parent: Mapping[str, Tensor], prefix: str) -> Iterator[None]:
    applier, rest = _rest(model, parent, prefix)
    if applier is None:
        yield
        return
    try:
        with applier.use(rest):
            yield
    finally:
        applier.remove()


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
