"""Experts hosted by several shards of this process: what remote experts do for a trunk, without a network."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import Checkpoint
from p2pmodel.engine.expert_calls import Pairs
from p2pmodel.engine.experts import ExpertShard, load_experts
from p2pmodel.engine.remote_experts import ForwardContext
from tests.support.families import save_small, small_fields

EXPERTS = 8
MANY = {"num_local_experts": EXPERTS, "num_experts": EXPERTS, "n_routed_experts": EXPERTS}


def save_experts(kind: str, folder: Path, **changes: Any) -> None:
    """A small checkpoint of EXPERTS experts, of which 4 are chosen for a token."""
    fields = small_fields(kind)
    known = {name: value for name, value in MANY.items() if name in fields}
    save_small(kind, folder, **known, num_experts_per_tok=4, **changes)


class LocalExperts:
    """Implements `remote_experts.RemoteExperts`. rows: how many were handed to each shard."""

    def __init__(self, shards: Sequence[ExpertShard], states: Sequence[Mapping[str, Tensor]] = ()) -> None:
        self.shards = shards
        self.states = states or [{} for _ in shards]
        self.rows = [0] * len(shards)

    def sums(
        self,
        layer: int,
        rows: Tensor,
        experts: Tensor,
        gates: Tensor,
        context: ForwardContext,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Tensor:
        meanwhile()
        total = torch.zeros(rows.shape)
        for number, shard in enumerate(self.shards):
            row, place = torch.isin(experts, torch.tensor(shard.experts)).nonzero(as_tuple=True)
            if not len(row):
                continue
            own, local = torch.unique(row, return_inverse=True)
            self.rows[number] += len(own)
            pairs = Pairs(local, experts[row, place], gates[row, place].float())
            total.index_add_(0, own, shard.compute(layer, rows[own], pairs, self.states[number]))
        return total

    def gradients(
        self, layer: int, rows: Tensor, experts: Tensor, gates: Tensor, outer: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        of_rows, of_gates = torch.zeros(rows.shape), torch.zeros(gates.shape)
        for shard in self.shards:
            row, place = torch.isin(experts, torch.tensor(shard.experts)).nonzero(as_tuple=True)
            if len(row):
                pairs = Pairs(row, experts[row, place], gates[row, place].float())
                part, gate = shard.gradients(layer, rows, pairs, outer)
                of_rows += part
                of_gates[row, place] = gate
        return of_rows, of_gates


def load_shards(checkpoint: Checkpoint, peers: int) -> list[ExpertShard]:
    """All experts of all layers, spread over `peers`."""
    cuts = [EXPERTS * number // peers for number in range(peers + 1)]
    everything = Span(0, checkpoint.layers)
    return [load_experts(checkpoint, everything, range(a, b)) for a, b in itertools.pairwise(cuts)]
