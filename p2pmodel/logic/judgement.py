"""What a maintainer makes of exam scores: which patches enter a merge, and whether a candidate is accepted.

Scores are losses in nats per byte by domain of the exam; lower is better. A specialist's patch may cost other domains
something, since the merge shares that out; a version may not.
"""

from collections.abc import Mapping

from p2pmodel.domain.model import Limits

PATCH_MUST_GAIN = 0.0005
"""Relative: a patch has to make at least one domain this much better."""
PATCH_MAY_COST = 0.10
"""Relative: a patch that makes any domain this much worse is broken or hostile."""


def mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def why_leave_out(parent: Mapping[str, float], patch: Mapping[str, float]) -> str:
    """The reason for leaving a patch out of the merge; empty when it enters."""
    change = {domain: patch[domain] / parent[domain] - 1 for domain in parent}
    best, worst = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
    if not all(value == value for value in change.values()):
        return "its loss is not a number"
    if change[worst] > PATCH_MAY_COST:
        return f"it makes {worst} worse by {change[worst]:.1%}"
    if change[best] > -PATCH_MUST_GAIN:
        return f"it improves no domain (best: {best}, {change[best]:+.2%})"
    return ""


def why_reject(parent: Mapping[str, float], candidate: Mapping[str, float], limits: Limits) -> str:
    """The reason for rejecting a candidate; empty when it is accepted: the mean falls, and no domain regresses beyond
    the Manifest's tolerance."""
    if not mean(candidate) < mean(parent):
        return f"the mean loss does not fall ({mean(parent):.4f} to {mean(candidate):.4f} nats per byte)"
    for domain, before in parent.items():
        if candidate[domain] > before * (1 + limits.regression_tolerance):
            worse = candidate[domain] / before - 1
            return f"{domain} regresses by {worse:.2%}, more than {limits.regression_tolerance:.2%}"
    return ""


def objective(parent: Mapping[str, float], candidate: Mapping[str, float], limits: Limits) -> float:
    """What the search for the scale α minimises on the tuning split: the mean loss, and steeply what any domain loses
    beyond half of the tolerance, because the deciding split will not be kinder."""
    excess = (max(0.0, candidate[d] / parent[d] - 1 - limits.regression_tolerance / 2) for d in parent)
    return mean(candidate) + 10 * mean(parent) * sum(excess)
