"""The scale α of a merge, found on the tuning part of an exam."""

from collections.abc import Callable
from math import inf, isfinite

from p2pmodel.domain.errors import Rejected

ALPHA_STEP = 1 / 16


def search_alpha(score: Callable[[float], float], highest: float = 4.0) -> float:
    """The scale with the lowest score, a multiple of 1/16 in (0, highest]; four to six evaluations, none twice.

    The score is close to a parabola in α: three points that enclose the lowest, then the vertex through them. A scale
    whose score is Rejected("finite") is worse than all others; raises that when none of those tried has a score.
    """
    seen: dict[float, float] = {}

    def at(alpha: float) -> float:
        if alpha not in seen:
            try:
                seen[alpha] = score(alpha)
            except Rejected as error:
                if error.reason != "finite":
                    raise
                seen[alpha] = inf
        return seen[alpha]

    for alpha in (0.5, 1.0, 2.0):
        at(alpha)
    best = min(seen, key=lambda alpha: (at(alpha), alpha))
    while best == max(seen) and best < highest:
        at(min(2 * best, highest))
        best = min(seen, key=lambda alpha: (at(alpha), alpha))
    if best == min(seen):
        at(best / 2)
        best = min(seen, key=lambda alpha: (at(alpha), alpha))
    points = sorted(seen)
    middle = min(max(points.index(best), 1), len(points) - 2)
    vertex = _vertex(*((alpha, at(alpha)) for alpha in points[middle - 1 : middle + 2]))
    if vertex is not None:
        at(min(max(round(vertex / ALPHA_STEP) * ALPHA_STEP, ALPHA_STEP), highest))
    best = min(seen, key=lambda alpha: (at(alpha), alpha))
    if at(best) == inf:
        raise Rejected("finite", "At no scale does the merge give a loss that is a number.")
    return best


def _vertex(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float | None:
    """Where the parabola through three points is lowest; None when it opens downwards, or one of them is
    infinitely high."""
    left, right = (b[1] - a[1]) / (b[0] - a[0]), (c[1] - b[1]) / (c[0] - b[0])
    curvature = (right - left) / (c[0] - a[0])
    return None if not (curvature > 0 and isfinite(curvature)) else (a[0] + b[0]) / 2 - left / (2 * curvature)
