"""Patches of modular experts: what their blobs hold, how one is trained, and how several come together.

A patch brings one expert whole, or new values for some slots of experts that its parent has: an adapter, or rows of the
routers. Where only one patch holds a slot, it goes in as it is; two that hold the same expert's are merged by Fisher.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.domain.modular import (
    DOWN,
    GATE,
    KIND,
    PARTS,
    PREFIX,
    ROUTER,
    ROUTING,
    UP,
    Expert,
    Experts,
    experts_in,
    is_name,
    max_rank,
    place_of,
    pool_slot,
    slots_of_expert,
)
from p2pmodel.tensors import blob, compact, patch_kind
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change
from p2pmodel.tensors.gates import fit_gates, gate_slots
from p2pmodel.tensors.ia3 import layers_path
from p2pmodel.tensors.merging.contributions import Contribution
from p2pmodel.tensors.merging.fisher import FisherMean
from p2pmodel.tensors.patch_kind import Fit, Lesson
from p2pmodel.tensors.smear import beginning
from p2pmodel.tensors.smear_hooks import Applier

MAX_VALUE = 1e4
"""Of any value of an expert. Beyond, scores and their squares leave what float32 holds, and shares are no numbers."""
ROUTING_FISHER = 1.0
"""Of what no gradient was taken of: two contributors' rows count alike."""


def find_pools(base: nn.Module) -> tuple[Slot, ...]:
    """One for each layer, sorted by name. Raises InvalidInput for a model without a list of layers."""
    path = layers_path(base)
    width = int(base.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
    count = len(list(base.get_submodule(path.removesuffix(".")).children()))
    return tuple(sorted((pool_slot(f"{path}{index}", width) for index in range(count)), key=lambda slot: slot.name))


def read(raw: Raw, pools: Sequence[Slot], limit: int) -> Change:
    """Raises Rejected."""
    values = blob.unpack(raw, None, limit)
    known = {pool.name: pool for pool in pools}
    ranks: dict[str, int] = {}
    for name, tensor in values.items():
        place = place_of(name)
        pool = known.get(name.rpartition(".")[0].rpartition(".")[0])
        if place is None or pool is None:
            raise Rejected("schema", f"{name[:64]!r} is no slot of an expert in this model.")
        rank = 1
        if place.part in (DOWN, UP):
            rank = ranks.setdefault(place.expert, tensor.shape[0] if tensor.ndim else 0)
            if not 1 <= rank <= max_rank(pool):
                raise Rejected(
                    "shape", f"Expert {place.expert} has rank {rank}; {pool.name[:128]} takes 1 to {max_rank(pool)}."
                )
        shape = slots_of_expert([pool], Expert(place.expert, rank))[PARTS.index(place.part)].shape
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise Rejected("shape", f"Slot {name[:128]!r} is float32 {list(shape)}, but the blob has another.")
        check_values(name, tensor)
    if not values:
        raise Rejected("shape", "The patch changes nothing.")
    return Change(values, False, tuple((name, tuple(tensor.shape)) for name, tensor in sorted(values.items())))


def check_values(name: str, tensor: Tensor) -> None:
    """Of a slot. Raises Rejected("finite")."""
    if float(tensor.abs().max()) > MAX_VALUE:
        raise Rejected("finite", f"Slot {name[:128]!r} has values beyond {MAX_VALUE:g}, which no expert needs.")


def check_parent(change: Change, pools: Sequence[Slot], before: Experts) -> Experts:
    """The experts that the change adds to a parent's. Raises Rejected for a part of an expert that is neither there nor
    brought whole, and for an update of another rank."""
    shapes = {name: change.shape(name) for name in change.values}
    held = {expert.name: expert for expert in experts_in(shapes)}
    known = {expert.name: expert for expert in before}
    for name, shape in shapes.items():
        place = place_of(name)
        if place is None:
            continue
        if place.expert not in known and place.expert not in held:
            raise Rejected(
                "expert",
                f"The patch has a {place.part} row for expert {place.expert!r}, which its parent version lacks.",
                "See what it has: p2pmodel expert list",
            )
        there = known.get(place.expert, held.get(place.expert))
        if place.part in (DOWN, UP) and there is not None and shape[0] != there.rank:
            raise Rejected("shape", f"Expert {there.name} has rank {there.rank}, but the patch's has {shape[0]}.")
    new = tuple(expert for name, expert in sorted(held.items()) if name not in known)
    for expert in new:
        missing = {slot.name for slot in slots_of_expert(pools, expert)} - shapes.keys()
        if missing:
            raise Rejected("expert", f"The patch brings expert {expert.name} without {min(missing)[:128]!r}.")
    return new


def merge(parent: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """The slots that the patches hold, float32. contributions: sorted by patch. Raises Rejected."""
    holders: dict[str, list[Contribution]] = {}
    for contribution in contributions:
        for slot in contribution.adapter:
            holders.setdefault(slot, []).append(contribution)
    merged = {slot: some[0].adapter[slot].clone() for slot, some in holders.items() if len(some) == 1}
    for slot, some in sorted(holders.items()):
        if slot in merged:
            continue
        start = parent[slot] if slot in parent else torch.zeros_like(some[0].adapter[slot])
        own = [
            Contribution(c.patch, {slot: c.adapter[slot]}, {slot: c.fisher[slot]}, c.weight, c.relative) for c in some
        ]
        update = FisherMean().combine({slot: start}, own, {})[slot]
        merged[slot] = (start.double() + update).to(torch.float32)
    return merged


def without_experts(state: Mapping[str, Tensor], left: Experts) -> dict[str, Tensor]:
    """The state with no experts but those that are left."""
    names = {expert.name for expert in left}
    places = {name: place_of(name) for name in state}
    return {name: t for name, t in state.items() if (place := places[name]) is None or place.expert in names}


def new_adapter(pools: Sequence[Slot], expert: Expert) -> dict[str, Tensor]:
    """{slot: values} of `down` and `up` of an expert that changes nothing yet."""
    values: dict[str, Tensor] = {}
    for pool in pools:
        down, up = (f"{pool.name}.{expert.name}.{part}" for part in (DOWN, UP))
        values[down] = beginning(pool.name, expert.rank, pool.shape[1])
        values[up] = torch.zeros(expert.rank, pool.shape[1])
    return values


class Trainee:
    """See `patch_kind.Trainee`. What is trained is some slots; what else the patch brings stays as it is."""

    def __init__(
        self,
        base: nn.Module,
        state: Mapping[str, Tensor],
        trained: Mapping[str, Tensor],
        brought: Mapping[str, Tensor],
        device: torch.device | str,
    ) -> None:
        """state: the experts that stay as they are; trained, brought: {slot: values} that the patch holds."""
        self.parameters: Mapping[str, Tensor] = {
            name: tensor.detach().to(device, torch.float32, copy=True).requires_grad_(True)
            for name, tensor in sorted(trained.items())
        }
        self._brought = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in sorted(brought.items())}
        still = {name: tensor.to(device) for name, tensor in (*state.items(), *self._brought.items())}
        self._state = {name: tensor for name, tensor in still.items() if name not in self.parameters}
        self._applier = Applier(base, [*self._state, *self.parameters])

    @contextmanager
    def use(self) -> Iterator[None]:
        with self._applier.use({**self._state, **self.parameters}):
            yield

    def adapter(self) -> dict[str, Tensor]:
        trained = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.parameters.items()}
        return dict(sorted({**trained, **self._brought}.items()))

    def squared_gradients(self, losses: Callable[[slice], Tensor], rows: int) -> dict[str, Tensor]:
        """One example after another."""
        leaves = list(self.parameters.values())
        sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in self.parameters.items()}
        for row in range(rows):
            with torch.enable_grad(), self.use():
                loss = losses(slice(row, row + 1)).sum()
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            for name, gradient in zip(self.parameters, gradients, strict=True):
                sums[name] += gradient.double().square()
        found = {name: total.cpu() for name, total in sums.items()}
        found |= {name: torch.full_like(t, ROUTING_FISHER * rows).double() for name, t in self._brought.items()}
        return dict(sorted(found.items()))

    def remove(self) -> None:
        self._applier.remove()


def routing_slots(names: Sequence[str]) -> list[str]:
    """Those of routers."""
    places = {name: place_of(name) for name in names}
    return [name for name, place in places.items() if place is not None and place.part in ROUTING]


class Kind:
    """See `patch_kind.PatchKind`. Its slots are pools, which say what experts a version may have; see
    `domain.modular`."""

    name, prefix, bytes_each, learning_rate = KIND, PREFIX, 6, 2e-3
    options = ("rank", "router")
    fit, relative, continued = Fit.NONE, False, False

    def find_slots(self, base: nn.Module) -> tuple[Slot, ...]:
        return find_pools(base)

    def initial(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        return {}

    def applier(self, base: nn.Module, slots: Sequence[str]) -> patch_kind.Applier:
        return Applier(base, slots)

    def trainee(self, lesson: Lesson) -> Trainee:
        """A new expert is trained behind a row that is found first; one that is there keeps its row."""
        state, options = lesson.parent, lesson.options
        known = {expert.name for expert in experts_in({name: tuple(t.shape) for name, t in state.items()})}
        brought: dict[str, Tensor] = {}
        if options.router:
            trained = {name: state[name] for name in routing_slots(list(state))}
            if not trained:
                raise InvalidInput("The version has no experts whose rows could be trained.", "Train an expert first.")
        elif options.expert in known:
            places = {name: place_of(name) for name in state}
            own = [n for n, place in places.items() if place is not None and place.expert == options.expert]
            trained = {name: state[name] for name in own if name not in routing_slots(own)}
        else:
            trained, brought = _new_expert(lesson)
        return Trainee(lesson.base, state, trained, brought, lesson.device)

    def read(self, adapter: Raw, slots: Sequence[Slot], limit: int) -> Change:
        return read(adapter, slots, limit)

    def read_fisher(self, change: Change, fisher: Raw, limit: int) -> Mapping[str, Tensor]:
        return compact.Decoded(fisher, change.fisher_places, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the rows of routers that an adapter comes with."""
        found = dict(moments)
        for name, moment in moments.items():
            place = place_of(name)
            if place is not None and place.part == DOWN:
                stem = name.removesuffix(DOWN)
                found.setdefault(stem + ROUTER, torch.full((moment.shape[1],), ROUTING_FISHER))
                found.setdefault(stem + GATE, torch.full((2,), ROUTING_FISHER))
        return dict(sorted(found.items()))

    def adapter_of(
        self, updates: Mapping[str, Tensor], parent: Mapping[str, Tensor], rank: int, like: Change | None = None
    ) -> tuple[dict[str, Tensor], float]:
        return {slot: (parent[slot].double() + update.double()).float() for slot, update in updates.items()}, 1.0

    def reduced(self, slot: str, mass: Tensor, update: Tensor) -> dict[str, Tensor]:
        return {slot: mass}


def _new_expert(lesson: Lesson) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({slot: values} of its adapter, of its rows)."""
    options = lesson.options
    if not is_name(options.expert):
        raise InvalidInput(
            f"{options.expert[:64]!r} is no name for an expert.",
            "Use 1 to 32 small letters, digits, '-' and '_': --expert NAME",
        )
    pools = find_pools(lesson.base)
    if options.rank > max_rank(pools[0]):
        raise InvalidInput(
            f"An expert of rank {options.rank} is larger than the model takes.",
            f"Use --rank {max_rank(pools[0])} or less.",
        )
    layers = [pool.name.removeprefix(PREFIX).removesuffix(".experts") for pool in pools]
    with lesson.at_parent():
        rows = gate_slots(fit_gates(lesson.model, lesson.ids, layers, lesson.seed), options.expert)
    return new_adapter(pools, Expert(options.expert, options.rank)), rows
