"""Training through the swarm: the model's layers are on peers, embeddings and head here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.head import RemoteApplier, load_head
from p2pmodel.node.asking.client import SwarmClient
from p2pmodel.node.patches.contributing import Assignment
from p2pmodel.tensors import ia3
from p2pmodel.tensors.patch_kind import Trainee

DEFAULT_CODEC = "bf16"
"""Half the bytes of fp32, and rounds a gradient by 0.4 % at most; scripts/bench/training.py compares the others."""


class ThroughSwarm:
    """A `contributing.Workplace`. codec: of hidden states and of their gradients."""

    def __init__(self, client: SwarmClient, codec: str) -> None:
        self._client, self._codec = client, codec

    @property
    def computes(self) -> tuple[str, str]:
        return "swarm", self._codec

    @contextmanager
    def open(
        self, assignment: Assignment, state: Mapping[str, Tensor], blocks: Blocks
    ) -> Iterator[tuple[PreTrainedModel, Trainee]]:
        """Raises InvalidInput for a kind whose parameters cannot travel, Unreachable."""
        if assignment.kind != "ia3@1":
            raise InvalidInput(
                f"Patches of kind {assignment.kind} change what is on other machines.",
                "Through the swarm, train --kind ia3; the others need the whole model here.",
            )
        state = {name: vector for name, vector in state.items() if name.startswith(ia3.PREFIX)}
        chain = self._client.chain(assignment.parent, self._codec)
        model = load_head(self._client.checkpoint, chain)
        trainee = ia3.Trainee(RemoteApplier(), state, "cpu")
        try:
            yield model, trainee
        finally:
            chain.close()
