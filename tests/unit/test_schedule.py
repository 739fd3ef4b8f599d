"""The learning rate over a training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.engine.training.schedule import FINAL_RATE, SCHEDULES, rate


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), st.floats(0, 1))
def test_rates_are_shares_that_rise_and_then_never_rise_again(schedule: str, steps: int, warm_up: float) -> None:
    rates = [rate(schedule, step, steps, warm_up) for step in range(steps)]
    assert all(0 < share <= 1 for share in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "last"), [("constant", 1.0), ("linear", FINAL_RATE), ("cosine", FINAL_RATE), ("wsd", 0.05)]
)
def test_each_ends_where_it_says(schedule: str, last: float) -> None:
    rates = [rate(schedule, step, 100, 0.1) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert rates[99] == pytest.approx(last)


def test_wsd_is_stable_until_the_last_fifth() -> None:
    rates = [rate("wsd", step, 100, 0.1) for step in range(100)]
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
