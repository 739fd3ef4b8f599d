"""LoRA (Hu et al., 2021, arXiv:2106.09685): updates of low rank of the linear layers of attention and FFN.

The blob holds for every slot `SLOT#a`, float32 [r, m], and `SLOT#b`, float32 [n, r], and once `scale`, float64 [1]: the
weight [n, m] gains scale · B·A, whichever of its sides is the input (GPT-2's Conv1D has its weight the other way
round). A merge takes the whole product, since a mean of factors is not a mean of updates.

Experts whose weights are stacked in one tensor have no LoRA: their factors would be stacks too, which nothing that
reads adapters (PEFT) understands. `fish` and `dense` reach them.
"""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change, Product, factored_places, factors
from p2pmodel.tensors.ia3 import widths
from p2pmodel.tensors.patch_kind import MAX_SCALE, Fit, Lesson
from p2pmodel.tensors.weights import PREFIX, FactoredKind, Ground, WeightTrainee, leaf

A, B, SCALE = "#a", "#b", "scale"
_SKIPPED = {"gate", "router"}
MAX_UPDATE = 1e30
"""Of any value of a product, far from where a float32 overflows."""


def targets(base: nn.Module, slots: Sequence[str]) -> dict[str, bool]:
    """Of the slots, the weights of linear layers, with whether the input is on the weight's last side.

    Raises InvalidInput when there are none."""
    found: dict[str, bool] = {}
    modules = dict(base.named_modules())
    for slot in slots:
        path, _, leaf_name = slot.removeprefix(PREFIX).rpartition(".")
        module = modules.get(path) if leaf_name == "weight" else None
        if module is None or path.rpartition(".")[2] in _SKIPPED or widths(module) == (0, 0):
            continue
        weight = module.get_parameter("weight")
        if weight.ndim == 2:
            found[slot] = not hasattr(module, "nf")
    if not found:
        raise InvalidInput("The model has no linear layers for LoRA.", "Use --kind fish or dense.")
    return found


class Trainee(WeightTrainee):
    """Its parameters are the factors: the input's side as Kaiming's uniform draws it, the output's side zeros."""

    def __init__(self, ground: Ground, inputs_last: Mapping[str, bool], rank: int, alpha: float, seed: int) -> None:
        """inputs_last: as `targets` gives it."""
        super().__init__(ground)
        self._slots = sorted(inputs_last)
        self._ranks = {slot: min(rank, *ground.weights[slot].shape) for slot in self._slots}
        self._scale = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        parameters: dict[str, Tensor] = {}
        for slot in self._slots:
            n, m = ground.weights[slot].shape
            shapes = {A: (self._ranks[slot], m), B: (n, self._ranks[slot])}
            drawn, width = (A, m) if inputs_last[slot] else (B, n)
            for part, shape in shapes.items():
                bound = 1 / sqrt(width) if part == drawn else 0.0
                values = (2 * torch.rand(shape, generator=generator) - 1) * bound
                parameters[slot + part] = leaf(values.to(ground.weights[slot].device))
        self.parameters = dict(sorted(parameters.items()))

    def weights(self) -> dict[str, Tensor]:
        return {
            slot: self._ground.weights[slot] + self._scale * (self.parameters[slot + B] @ self.parameters[slot + A])
            for slot in self._slots
        }

    def adapter(self) -> dict[str, Tensor]:
        held = {name: factor.detach().to("cpu", copy=True) for name, factor in self.parameters.items()}
        return held | {SCALE: torch.tensor([self._scale], dtype=torch.float64)}

    def reduced(self, slot: str, squares: Tensor) -> dict[str, Tensor]:
        return factors(slot, squares)


def read(raw: Raw, slots: Sequence[Slot], limit: int) -> Change:
    """Raises Rejected. What it takes is in proportion to `raw`: the product is made in parts, by whoever merges it."""
    tensors = blob.unpack(raw, None, limit)
    known = {slot.name: slot.shape for slot in slots if len(slot.shape) == 2}
    scale = tensors.pop(SCALE, None)
    if scale is None or scale.shape != (1,) or scale.dtype != torch.float64 or not 0 < float(scale) <= MAX_SCALE:
        raise Rejected("schema", f"A LoRA patch needs a scale between 0 and {MAX_SCALE:g}.")
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        slot, _, part = name.rpartition("#")
        if slot not in known or f"#{part}" not in (A, B):
            raise Rejected("schema", f"{name[:64]!r} is nothing that a LoRA patch of this model holds.")
        if tensor.dtype != torch.float32 or tensor.ndim != 2:
            raise Rejected("shape", f"{name[:64]!r} of the patch is no matrix of float32.")
        (right if f"#{part}" == A else left)[slot] = tensor
    if not left or left.keys() != right.keys():
        raise Rejected("shape", "A LoRA patch needs both factors of each slot, and one slot at least.")
    for slot in left:
        (n, rank), (other, m) = left[slot].shape, right[slot].shape
        if (n, m) != known[slot] or rank != other or not 1 <= rank <= min(n, m):
            raise Rejected("shape", f"The factors of {slot[:64]!r} do not multiply to its shape {known[slot]}.")
        if float(scale) * rank * float(left[slot].abs().max()) * float(right[slot].abs().max()) > MAX_UPDATE:
            raise Rejected("finite", f"The factors of {slot[:64]!r} are too large to be multiplied.")
    places = sorted(place for slot in left for place in factored_places(slot, known[slot]))
    return Change(Product(left, right, float(scale)), True, tuple(places))


def factored(updates: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """(what a LoRA blob holds of the best approximations of that rank, the share of the updates' squared norm that
    these keep). updates: matrices by slot."""
    held: dict[str, Tensor] = {SCALE: torch.ones(1, dtype=torch.float64)}
    whole = kept = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for slot, update in updates.items():
            some = min(rank, *update.shape)
            u, s, v = torch.svd_lowrank(update.double(), q=min(some + 8, *update.shape), niter=8)
            root = s[:some].sqrt()
            held[slot + B] = (u[:, :some] * root).float().contiguous()
            held[slot + A] = (v[:, :some] * root).T.float().contiguous()
            whole += float(update.double().square().sum())
            kept += float(s[:some].square().sum())
    return held, min(1.0, kept / whole) if whole else 1.0


class Kind(FactoredKind):
    """See `patch_kind.PatchKind`."""

    name, bytes_each, learning_rate = "lora@1", 1, 2e-3
    options = ("alpha", "rank")
    fit, continued = Fit.PART, False  # it begins with new factors in each round

    def trainee(self, lesson: Lesson) -> Trainee:
        inputs_last, options = targets(lesson.base, list(lesson.parent)), lesson.options
        return Trainee(Ground(lesson.base, lesson.parent), inputs_last, options.rank, options.alpha, lesson.seed)

    def read(self, adapter: Raw, slots: Sequence[Slot], limit: int) -> Change:
        return read(adapter, slots, limit)

    def fisher_of(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise InvalidInput(
            "The second moments of LoRA's factors say nothing of its product's Fisher.",
            "Use --fisher-labels model or data.",
        )

    def adapter_of(
        self, updates: Mapping[str, Tensor], parent: Mapping[str, Tensor], rank: int, like: Change | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """Of matrices only. What stays as it was trained keeps its factors."""
        matrices = {slot: update for slot, update in updates.items() if update.ndim == 2}
        if not matrices:
            raise InvalidInput("Only matrices fit into a LoRA patch, and none has changed.")
        if like is None:
            return factored(matrices, rank)
        trained = like.values
        assert isinstance(trained, Product)
        if not all(torch.equal(update.float(), trained[slot]) for slot, update in matrices.items()):
            return factored(matrices, max(len(trained.right[slot]) for slot in matrices))
        held = {SCALE: torch.tensor([trained.scale], dtype=torch.float64)}
        for slot in matrices:
            held |= {slot + A: trained.right[slot], slot + B: trained.left[slot]}
        return held, 1.0

    def reduced(self, slot: str, mass: Tensor, update: Tensor) -> dict[str, Tensor]:
        return super().reduced(slot, mass, update) if update.ndim == 2 else {}
