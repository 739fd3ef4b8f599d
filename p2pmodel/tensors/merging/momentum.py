"""Outer momentum: Nesterov's, over the rounds, as DiLoCo has it (Douillard et al., 2023, arXiv:2311.08105).

    v' = μ·v + δ̄        θ' = θ + α·(δ̄ + μ·v')

Nobody keeps or fetches v: every peer has the versions before, whose steps say what it was. A step s = α·(δ̄ + μ·v')
gives δ̄ back, so that

    v' = (s/α + μ·v) / (1 + μ)

and what was N steps ago counts for less than half a time per step: after REACH of them it is below 2e-5.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
REACH = 16
LEAST_ALPHA = 1e-3
"""Of a smaller step, little but what rounding left can be seen: it counts as none."""


def velocity(steps: Iterable[tuple[State, State, float]], momentum: float) -> dict[str, Tensor]:
    """v by slot, float64, after these steps, the oldest first: the values before, those after, and α of the step in
    units in which one update of α 1 is a patch's own."""
    found: dict[str, Tensor] = {}
    for before, after, alpha in steps:
        for name in sorted(before):
            step = after[name].to(torch.float64) - before[name].to(torch.float64)
            own = step / alpha if abs(alpha) >= LEAST_ALPHA else step * 0.0
            found[name] = (own + found[name] * momentum if name in found else own) / (1 + momentum)
    return found


def accelerated(update: Mapping[str, Tensor], velocity: Mapping[str, Tensor], momentum: float) -> dict[str, Tensor]:
    """δ̄ + μ·v' by slot, float64, as a strategy's δ̄ is; velocity: v, in the same units."""
    found = {}
    for name, own in update.items():
        found[name] = own * (1 + momentum)
        if name in velocity:
            found[name] = found[name] + velocity[name] * (momentum * momentum)
    return found
