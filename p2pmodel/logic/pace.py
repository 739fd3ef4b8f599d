"""How fast a node computes: measured once when it starts, then followed while it works."""

from math import exp, log

WEIGHT = 0.02
"""Of one step in the figure: a change of the machine shows within some hundred tokens."""
OUTLIER = 2.0
"""A step this many times slower or faster than expected counts as no more: it waited for a CPU that was busy."""
FASTEST, SLOWEST = 0.25, 8.0
"""Bounds of the figure, as factors of what was measured."""


def follow(seconds: float, measured: float, sample: float) -> float:
    """The figure after another `sample`, in the mean of logarithms: a slow step counts as much as a fast one."""
    surprise = min(max(log(max(sample, 1e-12) / seconds), -log(OUTLIER)), log(OUTLIER))
    return min(max(seconds * exp(WEIGHT * surprise), FASTEST * measured), SLOWEST * measured)
