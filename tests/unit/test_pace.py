"""The pace of a node: it follows what is really so, and not what happens once."""

import random

from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.logic.pace import FASTEST, SLOWEST, follow

MEASURED = 0.01


def after(samples: list[float]) -> float:
    seconds = MEASURED
    for sample in samples:
        seconds = follow(seconds, MEASURED, sample)
    return seconds


def test_one_step_that_waited_changes_little() -> None:
    assert after([100.0]) < 1.02 * MEASURED
    assert after([0.0]) > 0.98 * MEASURED


def test_a_lasting_change_shows_within_some_hundred_tokens() -> None:
    assert 1.8 < after([2 * MEASURED] * 200) / MEASURED <= 2.0
    assert 0.5 <= after([MEASURED / 2] * 200) / MEASURED < 0.56


def test_noise_averages_out() -> None:
    chance = random.Random(1)
    seconds = after([MEASURED * chance.lognormvariate(0, 0.4) for _ in range(2000)])
    assert 0.85 < seconds / MEASURED < 1.15


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_it_stays_within_bounds(samples: list[float]) -> None:
    assert FASTEST * MEASURED <= after(samples) <= SLOWEST * MEASURED
