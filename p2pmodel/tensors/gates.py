"""Router rows for an expert, from its own data and the model alone.

What routers see does not depend on any expert, so a row needs no training with the others: it is the discriminant
(Fisher, 1936) between what the layer makes of the contributor's own text and of text that the model itself writes,
which stands for all that it was made for. Two experts' rows are then comparable, since both are measured from the same
point: the softmax over them is the posterior of a Gaussian for each expert and one for the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from p2pmodel.domain.modular import GATE, PREFIX, ROUTER
from p2pmodel.tensors.smear import EPS, LEAD, norm, seen_by_router

OWN_EXAMPLES, WRITTEN_EXAMPLES = 256, 160
SKIPPED = 32
"""Of what the model writes: text begins otherwise than it goes on."""
SHRINKAGE = 0.3
BATCH = 32


@dataclass(frozen=True)
class Gate:
    """A row of one layer's router: row [H], scale and bias. See `smear`."""

    row: Tensor
    scale: float
    bias: float

    def slots(self, layer: str, expert: str) -> dict[str, Tensor]:
        pool = f"{PREFIX}{layer}.experts.{expert}"
        return {f"{pool}.{ROUTER}": self.row, f"{pool}.{GATE}": torch.tensor([self.scale, self.bias])}


def fit_gates(model: Any, ids: Tensor, layers: Sequence[str], seed: int) -> dict[str, Gate]:
    """By layer, its path below the base model. model: the causal one, as the parent version has it, its experts apart;
    ids: [N, T] of the contributor's own text."""
    generator = torch.Generator().manual_seed(seed)
    own = _seen(model, _cuts(ids, _start(model), generator), layers)
    written = _seen(model, _written(model, generator), layers)
    return {layer: discriminant(own[layer], written[layer]) for layer in layers}


def discriminant(own: Tensor, other: Tensor) -> Gate:
    """own [N, H], other [M, H]: what a router has seen."""
    width, count = own.shape[1], len(own) + len(other)
    here, there = own.double().mean(0), other.double().mean(0)
    spread, apart = torch.cat([own.double() - here, other.double() - there]), here - there
    ridge = float(spread.square().mean()) * SHRINKAGE + EPS
    # (ridge + spreadᵀ·spread / count)⁻¹ · apart, by a system of as many unknowns as there are examples.
    inner = torch.linalg.solve(
        spread @ spread.T + count * ridge * torch.eye(count, dtype=torch.float64), spread @ apart
    )
    row = (apart - spread.T @ inner) / ridge
    bias = -float(row @ (here + there)) / 2
    row = row - row.mean()
    # `smear` compares with the normalised row.
    scale = float((row.square().mean() + EPS).sqrt()) * width
    return Gate(row.float(), scale, bias)


@torch.inference_mode()
def _seen(model: Any, ids: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """[N, LEAD] -> by layer [N, H]."""
    base = model.base_model
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def note(layer: str, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        found[layer].append(seen_by_router(norm(hidden[:, :LEAD].float())).cpu())

    handles = [
        base.get_submodule(layer).register_forward_hook(lambda module, args, output, layer=layer: note(layer, output))
        for layer in layers
    ]
    try:
        for part in torch.split(ids, BATCH):
            model(input_ids=part.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts).clone() for layer, parts in found.items()}


def _cuts(ids: Tensor, start: int, generator: torch.Generator) -> Tensor:
    """[OWN_EXAMPLES, LEAD]: from anywhere in the examples, behind the token that a text begins with."""
    width = ids.shape[1]
    rows = torch.randint(len(ids), (OWN_EXAMPLES,), generator=generator)
    places = torch.randint(max(1, width - LEAD + 1), (OWN_EXAMPLES,), generator=generator)
    index = (places[:, None] + torch.arange(LEAD - 1)).clamp(max=width - 1)
    return torch.cat([torch.full((OWN_EXAMPLES, 1), start), ids[rows[:, None], index]], dim=1)


@torch.inference_mode()
def _written(model: Any, generator: torch.Generator) -> Tensor:
    """[M, LEAD]: out of texts that the model writes from nothing."""
    start = _start(model)
    current, cache = torch.full((WRITTEN_EXAMPLES, 1), start), None
    tokens = []
    for _ in range(SKIPPED + LEAD - 1):
        output = model(input_ids=current.to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1).cpu()
        current = torch.multinomial(chances, 1, generator=generator)
        tokens.append(current)
    return torch.cat([torch.full((WRITTEN_EXAMPLES, 1), start), *tokens[SKIPPED:]], dim=1)


def _start(model: Any) -> int:
    config = model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0


def gate_slots(gates: Mapping[str, Gate], expert: str) -> dict[str, Tensor]:
    """{slot: values} of rows of an expert."""
    return {name: tensor for layer, gate in gates.items() for name, tensor in gate.slots(layer, expert).items()}
