"""Error rates by simulation, at the worst place: a boundary that the mean just reaches."""

import random
from collections.abc import Sequence
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.logic.sequential import SequentialTest, Side

ERROR = 0.1
ORDERS = 150
values = st.lists(st.floats(-1, 1), min_size=8, max_size=60)


def stops(population: Sequence[float], boundary: float, seed: int, error: float = ERROR) -> tuple[Side, int]:
    """What somebody concludes that looks after every case, and after how many."""
    order = random.Random(seed).sample(population, len(population))
    test = SequentialTest(len(order), boundary, 1.0, error)
    for count, value in enumerate(order, 1):
        if test.add(value) is not Side.OPEN:
            return test.side, count
    return Side.OPEN, len(order)


@settings(max_examples=12)
@given(values, st.integers(0, 1 << 30))
def test_a_mean_on_the_boundary_is_said_to_be_below_it_no_more_often_than_the_error(
    population: list[float], seed: int
) -> None:
    centred = [(value - fmean(population)) / 2 for value in population]
    found = [stops(centred, 0.0, seed + order)[0] for order in range(ORDERS)]
    # The true rate is at most ERROR; three standard deviations above it.
    most = ORDERS * ERROR + 3 * (ORDERS * ERROR * (1 - ERROR)) ** 0.5
    assert found.count(Side.BELOW) <= most
    assert found.count(Side.ABOVE) <= most


@pytest.mark.parametrize("rate", [0.02, 0.05])
def test_rare_failures_are_not_overlooked(rate: float) -> None:
    """500 cases of which few fail, all the others the same: the first hundred say nothing of the rest."""
    failing = round(500 * rate)
    population = [1.0] * failing + [0.0] * (500 - failing)
    wrong = sum(stops(population, rate * 0.999, seed, 0.05)[0] is Side.BELOW for seed in range(40))
    assert wrong <= 40 * 0.05 + 3 * (40 * 0.05 * 0.95) ** 0.5


def test_clear_cases_need_few() -> None:
    chance = random.Random(0)
    better = [chance.gauss(-0.5, 0.2) for _ in range(400)]
    ends = [stops(better, 0.0, seed, 0.01) for seed in range(20)]
    assert {side for side, _ in ends} == {Side.BELOW}
    assert max(count for _, count in ends) < 40
    worse = [-value for value in better]
    assert stops(worse, 0.0, 1, 0.01)[0] is Side.ABOVE


@given(values, st.floats(-1, 1))
def test_the_two_sides_mirror_each_other(population: list[float], boundary: float) -> None:
    mirror = {Side.BELOW: Side.ABOVE, Side.ABOVE: Side.BELOW, Side.OPEN: Side.OPEN}
    one = SequentialTest(len(population), boundary, 1.0, ERROR)
    other = SequentialTest(len(population), -boundary, 1.0, ERROR)
    for value in population:
        side = one.add(value)
        # Where the mean is the boundary itself, both or neither may be refuted by rounding.
        assert other.add(-value) is mirror[side] or abs(fmean(population) - boundary) < 1e-9


def test_what_cannot_be_tested_is_refused() -> None:
    for reach, error in ((0.0, 0.05), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="sequential"):
            SequentialTest(5, 0.0, reach, error)
    test = SequentialTest(1, 0.0, 1.0, 0.05)
    test.add(0.0)
    with pytest.raises(ValueError, match="all of its cases"):
        test.add(0.0)
