"""The learning rate over the steps of a training, as a share of the peak.

After a linear warm-up:

- `constant`: the peak, to the end;
- `linear`: down to a tenth;
- `cosine`: down to a tenth along half a cosine (Loshchilov & Hutter, 2017, arXiv:1608.03983);
- `wsd`: warm-up, stable, decay: the peak, and over the last fifth linearly to zero (Hu et al., 2024, arXiv:2404.06395).
"""

import math

SCHEDULES = ("constant", "linear", "cosine", "wsd")
FINAL_RATE = 0.1
DECAY = 0.2
"""Share of the steps over which `wsd` decays."""


def rate(schedule: str, step: int, steps: int, warm_up: float) -> float:
    """For the step after `step` finished ones, above 0 and at most 1. warm_up: share of the steps."""
    rising = round(steps * warm_up)
    if step < rising:
        return (step + 1) / rising
    done = (step + 1 - rising) / max(1, steps - rising)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - (1 - FINAL_RATE) * done
    if schedule == "cosine":
        return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2
    falling = max(1, min(round(steps * DECAY), steps - rising))
    return min(1.0, (steps - step) / falling)
