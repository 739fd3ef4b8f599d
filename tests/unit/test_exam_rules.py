"""What judgement makes of sections with rules of their own, and of a part of the cases."""

import random

from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.model import Limits
from p2pmodel.logic.judgement import (
    PATCH_MAY_COST,
    Finding,
    Rule,
    Screening,
    mean,
    objective,
    regressions,
    why_leave_out,
    why_reject,
)

LIMITS = Limits(regression_tolerance=0.01)
RULES = {"prose": Rule(), "choice/facts": Rule(0.05), "regression/safe": Rule(0.0, strict=True)}
PARENT = {"prose": 2.0, "choice/facts": 0.4, "regression/safe": 0.25}


def changed(**sections: float) -> dict[str, float]:
    return {**PARENT, **{name.replace("_", "/"): score for name, score in sections.items()}}


def test_shares_are_no_losses() -> None:
    assert mean(PARENT) == 2.0
    assert mean({"choice/facts": 0.4}) == 0.0


def test_a_version_may_lose_what_its_sections_tolerate() -> None:
    assert why_reject(PARENT, changed(prose=1.9, choice_facts=0.45), LIMITS, RULES) == ""
    says = why_reject(PARENT, changed(prose=1.9, choice_facts=0.46), LIMITS, RULES)
    assert says == "choice/facts fails 46.0% of its cases, 6.0% more than before (5.0% may)"
    assert "regression/safe" in why_reject(PARENT, changed(prose=1.9, regression_safe=0.26), LIMITS, RULES)
    both = regressions(PARENT, changed(prose=2.1, regression_safe=0.5), LIMITS, RULES)
    assert len(both) == 2
    assert "prose regresses by 5.00%, more than 1.00%" in both[0]


def test_a_share_of_nothing_may_rise_from_zero_only_as_far_as_it_may() -> None:
    assert why_reject({"a": 1.0, "choice/b": 0.0}, {"a": 0.9, "choice/b": 0.005}, LIMITS) == ""
    assert why_reject({"a": 1.0, "choice/b": 0.0}, {"a": 0.9, "choice/b": 0.02}, LIMITS)


def test_an_exam_without_domains_wants_a_share_to_fall() -> None:
    assert why_reject({"choice/b": 0.5}, {"choice/b": 0.4}, LIMITS) == ""
    assert why_reject({"choice/b": 0.5}, {"choice/b": 0.5}, LIMITS) == "no section gets better"


def test_a_patch_that_touches_a_strict_section_stays_out_however_much_it_gains() -> None:
    assert why_leave_out(PARENT, changed(prose=1.0, choice_facts=0.48), RULES) == ""
    assert "choice/facts" in why_leave_out(PARENT, changed(prose=1.0, choice_facts=0.51), RULES)
    assert "regression/safe" in why_leave_out(PARENT, changed(prose=1.0, regression_safe=0.3), RULES)
    assert why_leave_out(PARENT, changed(choice_facts=0.3), RULES) == ""


def test_the_search_avoids_what_a_section_does_not_tolerate() -> None:
    good = objective(PARENT, changed(prose=1.99), LIMITS, RULES)
    assert good < objective(PARENT, changed(prose=1.9, regression_safe=0.5), LIMITS, RULES)


def screened(change: float, noise: float, cases: int, seed: int) -> tuple[Finding, int]:
    """What is found, and after how many cases."""
    chance = random.Random(seed)
    parent = [chance.uniform(50, 150) for _ in range(cases)]
    screening = Screening({"prose": parent})
    for count, case in enumerate(chance.sample(range(cases), cases)):
        if screening.finding is not Finding.OPEN:
            return screening.finding, count
        screening.see("prose", case, parent[case] * (1 + change + chance.gauss(0, noise)))
    return screening.finding, cases


def test_clear_patches_are_decided_early() -> None:
    for seed in range(10):
        found, cases = screened(-0.05, 0.02, 200, seed)
        assert found is Finding.ENTERS
        assert cases < 60
        assert screened(0.30, 0.05, 200, seed)[0] is Finding.LEFT_OUT


@given(st.integers(0, 1 << 20))
def test_a_patch_that_changes_nothing_stays_open(seed: int) -> None:
    assert screened(0.0, 0.0, 60, seed)[0] is Finding.OPEN


def test_a_harmful_patch_hardly_ever_enters() -> None:
    found = [screened(PATCH_MAY_COST + 0.002, 0.02, 80, seed)[0] for seed in range(200)]
    assert found.count(Finding.ENTERS) <= 2


def test_a_section_needs_no_more_cases_once_it_is_clear() -> None:
    screening = Screening({"prose": [100.0] * 100, "poems": [100.0] * 100})
    for case in range(60):
        screening.see("prose", case, 90.0)
    assert not screening.needs("prose")
    assert screening.needs("poems")
    findings = [screening.finding]
    for case in range(60):
        screening.see("poems", case, 105.0)
    assert [*findings, screening.finding] == [Finding.OPEN, Finding.ENTERS]
    assert screening.reason == ""
