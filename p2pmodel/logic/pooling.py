"""Which experts a round's patches may bring together."""

from collections.abc import Sequence
from dataclasses import dataclass

from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.modular import MAX_EXPERTS, Experts, united
from p2pmodel.domain.version import LeftOut


@dataclass(frozen=True)
class Pooled:
    """experts: of the version that comes of it."""

    experts: Experts
    left_out: tuple[LeftOut, ...]


def pooled(before: Experts, brought: Sequence[tuple[PatchId, Experts]]) -> Pooled:
    """before: the parent's; brought: by patch, those that it adds. Two patches may bring one expert, which is merged,
    but of two ranks the first one stands. Whether any is left out does not depend on the order; which one does, so a
    proposer gives them as it saw them, an order that no contributor chooses by trying ids."""
    experts = before
    left_out: list[LeftOut] = []
    for patch, new in brought:
        known = {expert.name: expert for expert in experts}
        clash = next((expert for expert in new if known.get(expert.name, expert) != expert), None)
        together = united(experts, new)
        if clash is not None:
            rank = known[clash.name].rank
            left_out.append(LeftOut(patch, f"another patch brings expert {clash.name} with rank {rank}"))
        elif len(together) > MAX_EXPERTS:
            left_out.append(LeftOut(patch, f"the model would have more than {MAX_EXPERTS} experts"))
        else:
            experts = together
    return Pooled(experts, tuple(left_out))
