"""What a maintainer makes of exam scores: which patches enter a merge, and whether a candidate is accepted.

Lower scores are better. A domain of the exam is scored in nats per byte; every other section, named `KIND/NAME`, by the
share of its cases that fail. A specialist's patch may cost other domains something, since the merge shares that out; a
version may not.

A patch is examined on few cases first, which is enough where it clearly helps or clearly harms. Of all the tests that
`Screening` makes of one patch, the chance that any is wrong about the changes that it counts is at most `SCREEN_ERROR`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from p2pmodel.domain.model import Limits
from p2pmodel.logic.sequential import SequentialTest, Side

PATCH_MUST_GAIN = 0.0005
"""Relative: a patch has to make at least one domain this much better; or any share lower."""
PATCH_MAY_COST = 0.10
"""Relative, of a share absolute: a patch that makes any section this much worse is broken or hostile."""
NO_NUMBER = "its loss is not a number"
"""The reason for leaving out a patch with which the model's losses are not finite: it has no scores to compare."""
SCREEN_ERROR = 0.01
SCREEN_REACH = 0.10
"""Relative to the mean text's loss: a text counts as changed by at most this much more or less than what is tested."""


@dataclass(frozen=True)
class Rule:
    """How much worse a section may get. tolerance: of a version, relative for a domain, absolute for a share; None for
    the Manifest's. strict: a patch may not cost the section more either."""

    tolerance: float | None = None
    strict: bool = False


DEFAULT_RULE = Rule()
Rules = Mapping[str, Rule]


def is_share(section: str) -> bool:
    """Whether its score is a share of failed cases, and no loss."""
    return "/" in section


def mean(scores: Mapping[str, float]) -> float:
    """Of the domains' losses; 0 when there are none."""
    losses = [score for name, score in scores.items() if not is_share(name)]
    return sum(losses) / len(losses) if losses else 0.0


def why_leave_out(parent: Mapping[str, float], patch: Mapping[str, float], rules: Rules | None = None) -> str:
    """The reason for leaving a patch out of the merge; empty when it enters."""
    if reason := harm(parent, patch, rules):
        return reason
    change = {section: _change(section, parent[section], patch[section]) for section in parent}
    if any(value < 0 if is_share(section) else value <= -PATCH_MUST_GAIN for section, value in change.items()):
        return ""
    best = min(change, key=change.__getitem__)
    return f"it improves no {'section' if is_share(best) else 'domain'} (best: {best}, {change[best]:+.2%})"


def harm(parent: Mapping[str, float], patch: Mapping[str, float], rules: Rules | None = None) -> str:
    """What a patch alone makes worse than it may; empty when there is nothing. All scores are finite: see
    `NO_NUMBER`."""
    change = {section: _change(section, parent[section], patch[section]) for section in parent}
    for section, value in sorted(change.items(), key=lambda item: -item[1]):
        if value > _may_cost(section, rules) + 1e-9:
            return f"it makes {section} worse by {value:.1%}"
    return ""


def why_reject(
    parent: Mapping[str, float], candidate: Mapping[str, float], limits: Limits, rules: Rules | None = None
) -> str:
    """The reason for rejecting a candidate; empty when it is accepted: the mean loss falls, and no section regresses
    beyond its tolerance. An exam without domains wants any share to fall."""
    has_losses = any(not is_share(section) for section in parent)
    if has_losses and not mean(candidate) < mean(parent):
        return f"the mean loss does not fall ({mean(parent):.4f} to {mean(candidate):.4f} nats per byte)"
    if not has_losses and not any(candidate[section] < parent[section] for section in parent):
        return "no section gets better"
    return next(iter(regressions(parent, candidate, limits, rules)), "")


def regressions(
    parent: Mapping[str, float], candidate: Mapping[str, float], limits: Limits, rules: Rules | None = None
) -> list[str]:
    """A sentence for every section that is worse than its parent's beyond the tolerance."""
    found = []
    for section, before in parent.items():
        allowed, now = tolerance(section, limits, rules), candidate[section]
        # Shares are quotients of small whole numbers: what rounding makes of an equality is no regression.
        if is_share(section) and now > before + allowed + 1e-9:
            found.append(
                f"{section} fails {now:.1%} of its cases, {now - before:.1%} more than before ({allowed:.1%} may)"
            )
        elif not is_share(section) and now > before * (1 + allowed):
            found.append(f"{section} regresses by {now / before - 1:.2%}, more than {allowed:.2%}")
    return found


def tolerance(section: str, limits: Limits, rules: Rules | None = None) -> float:
    """Relative for a domain, absolute for a share."""
    own = (rules or {}).get(section, DEFAULT_RULE).tolerance
    return limits.regression_tolerance if own is None else own


def objective(
    parent: Mapping[str, float], candidate: Mapping[str, float], limits: Limits, rules: Rules | None = None
) -> float:
    """What the search for the scale α minimises on the tuning split: the mean loss, and steeply what any section loses
    beyond half of its tolerance, because the deciding split will not be kinder."""
    excess = (
        max(0.0, _change(section, parent[section], candidate[section]) - tolerance(section, limits, rules) / 2)
        for section in parent
    )
    return mean(candidate) + 10 * (mean(parent) or 1.0) * sum(excess)


class Finding(Enum):
    ENTERS = "enters"
    LEFT_OUT = "left out"
    OPEN = "open"


class Screening:
    """A patch against its parent, case by case, until it is clear what becomes of it.

    It enters when every section is found to cost less than it may, and one domain to gain what it must; it is left out
    as soon as one section is found to cost more.
    """

    def __init__(self, parent: Mapping[str, Sequence[float]]) -> None:
        """parent: the amount (nats; 1 for a failed case) of each case of each section that is not strict."""
        self._parent = parent
        self._means = {name: sum(cases) / len(cases) or 1.0 for name, cases in parent.items()}
        error = SCREEN_ERROR / max(1, 2 * len(parent))
        self._cost = {
            name: SequentialTest(len(cases), PATCH_MAY_COST, 1.0 if is_share(name) else SCREEN_REACH, error)
            for name, cases in parent.items()
        }
        self._gain = {
            name: SequentialTest(len(cases), -PATCH_MUST_GAIN, SCREEN_REACH, error)
            for name, cases in parent.items()
            if not is_share(name)
        }

    def see(self, section: str, case: int, amount: float) -> None:
        """A case that was drawn, each at most once, in an order that does not depend on how it comes out."""
        change = amount - self._parent[section][case]
        if not is_share(section):
            change /= self._means[section]
            self._gain[section].add(change)
        self._cost[section].add(change)

    @property
    def finding(self) -> Finding:
        sides = [test.side for test in self._cost.values()]
        if Side.ABOVE in sides:
            return Finding.LEFT_OUT
        return Finding.ENTERS if self._gains and all(side is Side.BELOW for side in sides) else Finding.OPEN

    @property
    def reason(self) -> str:
        """For leaving it out; empty when it is not."""
        worse = [name for name, test in self._cost.items() if test.side is Side.ABOVE]
        return f"it makes {worse[0]} worse by more than {PATCH_MAY_COST:.1%}" if worse else ""

    def needs(self, section: str) -> bool:
        """Whether more cases of the section could settle anything."""
        if self._cost[section].side is Side.OPEN:
            return True
        return not self._gains and section in self._gain and self._gain[section].side is Side.OPEN

    @property
    def _gains(self) -> bool:
        return any(test.side is Side.BELOW for test in self._gain.values())


def _may_cost(section: str, rules: Rules | None) -> float:
    rule = (rules or {}).get(section, DEFAULT_RULE)
    return (rule.tolerance or 0.0) if rule.strict else PATCH_MAY_COST


def _change(section: str, before: float, now: float) -> float:
    """Of a share the difference, of a loss the difference by what it was."""
    return now - before if is_share(section) else now / before - 1
