from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.model import Limits
from p2pmodel.logic.judgement import objective, why_leave_out, why_reject

LIMITS = Limits(regression_tolerance=0.005)
PARENT = {"a": 1.0, "b": 2.0}
losses = st.fixed_dictionaries({"a": st.floats(0.1, 10), "b": st.floats(0.1, 10)})


def test_a_specialist_enters() -> None:
    assert why_leave_out(PARENT, {"a": 0.9, "b": 2.05}) == ""


def test_a_patch_that_helps_nowhere_stays_out() -> None:
    assert "improves no domain" in why_leave_out(PARENT, {"a": 1.0, "b": 2.0})


def test_a_patch_that_breaks_a_domain_stays_out_and_the_reason_names_it() -> None:
    assert why_leave_out(PARENT, {"a": 0.5, "b": 2.5}) == "it makes b worse by 25.0%"


def test_a_candidate_may_not_trade_one_domain_for_another() -> None:
    assert why_reject(PARENT, {"a": 0.9, "b": 2.0}, LIMITS) == ""
    assert "b regresses by 1.00%" in why_reject(PARENT, {"a": 0.5, "b": 2.02}, LIMITS)
    assert "does not fall" in why_reject(PARENT, PARENT, LIMITS)


@given(losses, losses)
def test_what_is_accepted_is_better_and_the_search_prefers_it_to_standing_still(
    parent: dict[str, float], candidate: dict[str, float]
) -> None:
    if not why_reject(parent, candidate, Limits(regression_tolerance=0.0)):
        assert sum(candidate.values()) < sum(parent.values())
        assert objective(parent, candidate, Limits(regression_tolerance=0.0)) <= objective(parent, parent, Limits())
