"""The merge: the same bits for everybody, closed forms, and what a liar cannot do."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.model import MergeSpec
from p2pmodel.tensors import blob, merging
from p2pmodel.tensors.merging import Contribution, apply_update, columns, get_strategy, momentum
from p2pmodel.wire import canonical

FISHER, MEAN, SUM, TIES, MEDIAN = STRATEGIES = tuple(
    get_strategy(f"{name}@1") for name in ("fisher", "mean", "task-arithmetic", "ties", "coordinate-median")
)
NO_CLIP = {"fisher_clip": 1e12, "norm_clip": 1e12}

values = st.floats(-4, 4, width=32)
masses = st.floats(0, 1, width=32)


def patch_id(number: int) -> PatchId:
    return canonical.digest(str(number).encode())


def contribution(number: int, adapter: Sequence[float], fisher: Sequence[float], weight: float = 1.0) -> Contribution:
    return Contribution(patch_id(number), {"s": torch.tensor(adapter)}, {"s": torch.tensor(fisher)}, weight)


def combine(
    strategy: merging.MergeStrategy,
    parent: dict[str, Tensor],
    given: Sequence[Contribution],
    parameters: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    ordered = sorted(given, key=lambda c: c.patch)
    return strategy.combine(parent, ordered, parameters or {})


def rows(count: st.SearchStrategy[int], width: int = 3) -> st.SearchStrategy[list[Contribution]]:
    def build(n: int) -> st.SearchStrategy[list[Contribution]]:
        one = st.tuples(*(st.lists(of, min_size=width, max_size=width) for of in (values, masses)))
        return st.lists(one, min_size=n, max_size=n).map(
            lambda parts: [contribution(i, adapter, fisher) for i, (adapter, fisher) in enumerate(parts)]
        )

    return count.flatmap(build)


@given(rows(st.integers(1, 7)), st.randoms(), st.sampled_from(STRATEGIES))
def test_any_order_of_arrival_gives_the_same_bits(
    given: list[Contribution], random: object, strategy: merging.MergeStrategy
) -> None:
    parent = {"s": torch.ones(3)}
    first = combine(strategy, parent, given)
    random.shuffle(given)  # type: ignore[attr-defined]
    again = combine(strategy, parent, given)
    assert blob.pack(first) == blob.pack(again)


@given(st.lists(values, min_size=3, max_size=3), st.lists(masses, min_size=3, max_size=3))
def test_one_patch_at_alpha_one_is_that_patch_where_it_has_mass(adapter: list[float], fisher: list[float]) -> None:
    parent = {"s": torch.ones(3)}
    result = apply_update(parent, combine(FISHER, parent, [contribution(0, adapter, fisher)]), 1.0)["s"]
    expected = torch.where(torch.tensor(fisher) > 0, torch.tensor(adapter), parent["s"])
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-12)


@given(rows(st.integers(1, 6)))
def test_equal_fishers_give_the_mean(given: list[Contribution]) -> None:
    parent = {"s": torch.ones(3)}
    assume(all(bool((c.adapter["s"] != 1).any()) for c in given))  # no multiple of a norm of zero is above it
    same = [Contribution(c.patch, c.adapter, {"s": torch.full((3,), 1e-10)}, 1.0) for c in given]
    torch.testing.assert_close(combine(FISHER, parent, same, NO_CLIP)["s"], combine(MEAN, parent, same)["s"])


@given(rows(st.integers(1, 6)))
def test_no_fisher_mass_leaves_the_parent(given: list[Contribution]) -> None:
    parent = {"s": torch.ones(3)}
    zero = [Contribution(c.patch, c.adapter, {"s": torch.zeros(3)}, 1.0) for c in given]
    none = [Contribution(c.patch, c.adapter, {}, 1.0) for c in given]
    for patches in (zero, none):
        assert torch.equal(apply_update(parent, combine(FISHER, parent, patches), 1.0)["s"], parent["s"])


@given(rows(st.integers(1, 6)))
def test_the_mean_update_lies_between_the_updates(given: list[Contribution]) -> None:
    parent = {"s": torch.ones(3)}
    updates = torch.stack([c.adapter["s"].double() - 1 for c in given])
    for strategy in (FISHER, MEAN):
        result = combine(strategy, parent, given)["s"]
        assert bool(torch.isfinite(result).all())
        assert bool((result <= updates.amax(0).clamp(min=0) + 1e-12).all())
        assert bool((result >= updates.amin(0).clamp(max=0) - 1e-12).all())


def test_closed_forms_of_scalars() -> None:
    parent = {"s": torch.tensor([1.0])}
    given = [
        contribution(0, [2.0], [1e-10]),
        contribution(1, [4.0], [3e-10], weight=2.0),
        contribution(2, [1.0], [2e-10]),
    ]
    expected = (1 * 1e-10 * 1 + 2 * 3e-10 * 3 + 1 * 2e-10 * 0) / (1e-10 + 2 * 3e-10 + 2e-10)
    assert combine(FISHER, parent, given, NO_CLIP)["s"].item() == pytest.approx(expected, rel=1e-6)
    assert combine(MEAN, parent, given)["s"].item() == pytest.approx((1 + 2 * 3 + 0) / 4)
    # The median Fisher is 2e-10, so that 3e-10 is clipped at 2e-10 when the limit is one median.
    clipped = (1e-10 * 1 + 2 * 2e-10 * 3) / (1e-10 + 2 * 2e-10 + 2e-10)
    result = combine(FISHER, parent, given, {**NO_CLIP, "fisher_clip": 1.0})["s"]
    assert result.item() == pytest.approx(clipped, rel=1e-6)


def test_the_norm_of_an_update_is_clipped_at_a_multiple_of_the_median() -> None:
    parent = {"s": torch.zeros(2)}
    ones = [1.0, 1.0]
    given = [contribution(i, update, ones) for i, update in enumerate(([1.0, 0.0], [0.0, 1.0], [300.0, 400.0]))]
    # norms 1, 1, 500: the last update is scaled to a norm of 3, so to (1.8, 2.4)
    expected = torch.tensor([2.8 / 3, 3.4 / 3], dtype=torch.float64)
    torch.testing.assert_close(combine(FISHER, parent, given)["s"], expected)


@settings(max_examples=50)
@given(rows(st.integers(3, 7)), st.floats(1, 1e6), st.booleans())
def test_a_liar_is_bounded(honest: list[Contribution], scale: float, also_values: bool) -> None:
    parent = {"s": torch.zeros(3)}
    liar = Contribution(
        patch_id(99), {"s": torch.full((3,), scale if also_values else 4.0)}, {"s": torch.full((3,), 1e6)}, 1.0
    )
    given = [Contribution(c.patch, c.adapter, {"s": c.fisher["s"] + 0.1}, 1.0) for c in honest]
    result = combine(FISHER, parent, [*given, liar])["s"]
    largest = max(float(c.adapter["s"].norm()) for c in given)
    assert float(result.norm()) <= math.sqrt(3) * 3 * max(largest, 1e-12) + 1e-9
    fishers = torch.stack([c.fisher["s"] for c in given])
    share = 2 * fishers.amax(0) / (fishers.sum(0) + 2 * fishers.amax(0))
    without = torch.stack([c.adapter["s"] for c in given]).abs().amax(0)
    assert bool((result.abs() <= without + share * max(3 * largest, 0) + 1e-6).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["adapter", "fisher"])
def test_what_is_not_finite_never_gets_out(bad: float, where: str) -> None:
    good = contribution(0, [1.0, 2.0], [1.0, 1.0])
    evil = contribution(1, [bad, 1.0], [1.0, 1.0]) if where == "adapter" else contribution(1, [1.0, 1.0], [bad, 1.0])
    with pytest.raises(Rejected) as refused:
        combine(FISHER, {"s": torch.ones(2)}, [good, evil])
    assert refused.value.reason == "finite"


def test_an_update_that_overflows_is_refused() -> None:
    with pytest.raises(Rejected, match="finite"):
        apply_update({"s": torch.ones(1)}, {"s": torch.tensor([1e38], dtype=torch.float64)}, 1e3)


def test_the_largest_and_smallest_numbers_merge() -> None:
    given = [contribution(i, [3e38, 1e-45], [3e38, 1e-45]) for i in range(3)]
    result = combine(FISHER, {"s": torch.zeros(2)}, given)["s"]
    torch.testing.assert_close(result.float(), torch.tensor([3e38, 1e-45]))


def test_a_patch_without_a_slot_leaves_it_unchanged() -> None:
    parent = {"a": torch.ones(2), "b": torch.ones(2)}
    one = torch.ones(2)
    given = [
        Contribution(patch_id(0), {"a": one * 3}, {"a": one}, 1.0),
        Contribution(patch_id(1), {"a": one * 3, "b": one * 5}, {"a": one, "b": one}, 1.0),
    ]
    assert combine(MEAN, parent, given)["b"].tolist() == [2.0, 2.0]
    assert combine(FISHER, parent, given)["a"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, strategy: merging.MergeStrategy, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    parent = {"a": torch.ones(7, 11, dtype=dtype), "b": torch.ones(50, dtype=dtype)}

    def one(number: int) -> Contribution:
        adapter = {n: t + torch.randn(t.shape, generator=generator, dtype=dtype) for n, t in parent.items()}
        fisher = {n: torch.rand(t.shape, generator=generator) for n, t in parent.items()}
        return Contribution(patch_id(number), adapter, fisher, 1.0 + number)

    given = [one(number) for number in range(9)]
    whole = combine(strategy, parent, given)
    monkeypatch.setattr(columns, "BLOCK_ELEMENTS", 9 * 20)
    monkeypatch.setattr(columns, "CACHED_ELEMENTS", 130)
    assert blob.pack(combine(strategy, parent, given)) == blob.pack(whole)
    read = [
        Contribution(
            c.patch,
            blob.unpack(blob.pack(c.adapter), None, 1 << 20),
            blob.unpack(blob.pack(c.fisher), None, 1 << 20),
            c.weight,
        )
        for c in given
    ]
    assert blob.pack(combine(strategy, parent, read)) == blob.pack(whole)


@pytest.mark.parametrize("numbers", [[], [0, 0]])
def test_no_patch_or_one_twice_is_refused(numbers: list[int]) -> None:
    given = [contribution(n, [1.0], [1.0]) for n in numbers]
    with pytest.raises(Rejected, match="each once"):
        MEAN.combine({"s": torch.ones(1)}, given, {})


def test_patches_out_of_order_are_refused() -> None:
    given = sorted((contribution(n, [1.0], [1.0]) for n in range(2)), key=lambda c: c.patch, reverse=True)
    with pytest.raises(Rejected, match="sorted by id"):
        MEAN.combine({"s": torch.ones(1)}, given, {})


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(Rejected, match="weights"):
        combine(MEAN, {"s": torch.ones(1)}, [contribution(i, [1.0], [1.0], w) for i, w in enumerate(weights)])


def test_a_slot_in_another_shape_is_refused() -> None:
    with pytest.raises(Rejected) as refused:
        combine(MEAN, {"s": torch.ones(2)}, [contribution(0, [1.0], [1.0])])
    assert refused.value.reason == "shape"


@pytest.mark.parametrize("parameters", [{"fisher_clop": 1.0}, {"norm_clip": 0.0}, {"norm_clip": math.nan}])
def test_parameters_that_are_not_known_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(Rejected, match="parameter"):
        combine(FISHER, {"s": torch.ones(1)}, [contribution(0, [1.0], [1.0])], parameters)


def test_the_result_has_the_parents_dtype_and_slots() -> None:
    parent = {"s": torch.ones(2, dtype=torch.bfloat16), "t": torch.ones(1)}
    result = apply_update(parent, {"s": torch.full((2,), 0.5, dtype=torch.float64)}, 2.0)
    assert result["s"].dtype == torch.bfloat16
    assert result["s"].tolist() == [2.0, 2.0]
    assert result["t"].tolist() == [1.0]


def test_an_unknown_strategy_is_not_found() -> None:
    with pytest.raises(NotFound):
        get_strategy("magic@1")


def test_a_sum_is_the_mean_of_as_many() -> None:
    given = [contribution(i, [2.0 + i], [1.0], weight=1.0 + i) for i in range(4)]
    parent = {"s": torch.ones(1)}
    total, mean = (combine(strategy, parent, given)["s"].item() for strategy in (SUM, MEAN))
    assert total == pytest.approx(10 * mean)
    assert SUM.unit(4) == 0.25


def test_ties_trims_elects_a_sign_and_takes_the_mean_of_those_who_agree() -> None:
    parent = {"s": torch.zeros(5)}
    given = [
        contribution(0, [5.0, 4.0, 0.1, -2.0, 0.0], [1.0] * 5),
        contribution(1, [3.0, -1.0, 0.2, -4.0, 0.0], [1.0] * 5),
        contribution(2, [-9.0, 8.0, 0.3, 0.1, 0.0], [1.0] * 5, weight=0.5),
    ]
    result = combine(TIES, parent, given, {"density": 0.4})["s"]
    # What stays: 5 and 4; 3 and -4; -9 and 8. The first is elected 8 to 4.5, the second is 4 and 8 with weight 0.5.
    assert result.tolist() == pytest.approx([4.0, 8.0 / 1.5, 0.0, -4.0, 0.0])


@given(rows(st.integers(1, 7)))
def test_the_median_of_equal_weights_is_the_textbooks(given: list[Contribution]) -> None:
    parent = {"s": torch.ones(3)}
    updates = torch.stack([c.adapter["s"].double() - 1 for c in given])
    expected = torch.quantile(updates, 0.5, dim=0)
    loose = {"norm_clip": 1e12}
    torch.testing.assert_close(combine(MEDIAN, parent, given, loose)["s"], expected)


def test_a_median_is_weighted_and_a_minority_moves_nothing() -> None:
    parent = {"s": torch.zeros(1)}
    given = [contribution(i, [v], [1.0], w) for i, (v, w) in enumerate(((1.0, 1.0), (2.0, 1.0), (9.0, 3.0)))]
    assert combine(MEDIAN, parent, given, {"norm_clip": 1e12})["s"].item() == 9.0
    even = [contribution(i, [v], [1.0], w) for i, (v, w) in enumerate(((1.0, 2.0), (2.0, 1.0), (9.0, 1.0)))]
    assert combine(MEDIAN, parent, even, {"norm_clip": 1e12})["s"].item() == 1.5
    few = [contribution(i, [50.0 if i < 2 else 0.0], [1.0]) for i in range(5)]
    assert combine(MEDIAN, parent, few)["s"].item() == 0.0


@given(rows(st.integers(3, 7)), st.sampled_from([FISHER, SUM, TIES, MEDIAN]))
def test_every_strategy_but_the_plain_mean_clips_norms(
    honest: list[Contribution], strategy: merging.MergeStrategy
) -> None:
    parent = {"s": torch.zeros(3)}
    liar = Contribution(patch_id(99), {"s": torch.full((3,), 1e6)}, {"s": torch.ones(3)}, 1.0)
    largest = max(float(c.adapter["s"].norm()) for c in honest)
    result = combine(strategy, parent, [*honest, liar])["s"]
    assert float(result.norm()) <= (len(honest) + 1) * math.sqrt(3) * 3 * max(largest, 1e-12) + 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_strategy_refuses_to_merge_it_refuses_beforehand(strategy: merging.MergeStrategy) -> None:
    strategy.check({})
    strategy.check({"norm_clip": 2.0})
    for wrong in ({"magic": 1.0}, {"norm_clip": 0.0}, {"norm_clip": math.inf}):
        with pytest.raises(Rejected, match="parameter"):
            strategy.check(wrong)


def test_a_density_is_a_share() -> None:
    with pytest.raises(Rejected, match="density"):
        TIES.check({"density": 1.5})


@given(
    st.lists(st.tuples(st.floats(0.1, 3), st.lists(values, min_size=3, max_size=3)), min_size=1, max_size=8),
    st.floats(0.05, 0.95),
)
def test_the_velocity_is_found_again_from_the_steps_alone(
    rounds: list[tuple[float, list[float]]], momentum_of: float
) -> None:
    """As an outer optimiser that keeps it would have it."""
    state, kept = {"s": torch.zeros(3, dtype=torch.float64)}, torch.zeros(3, dtype=torch.float64)
    steps: list[tuple[dict[str, Tensor], dict[str, Tensor], float]] = []
    for alpha, update in rounds:
        own = {"s": torch.tensor(update, dtype=torch.float64)}
        found = momentum.velocity(steps, momentum_of)
        step = momentum.accelerated(own, found, momentum_of)["s"]
        kept = momentum_of * kept + own["s"]
        torch.testing.assert_close(step, own["s"] + momentum_of * kept, rtol=1e-6, atol=1e-6)
        after = {"s": state["s"] + alpha * step}
        steps.append((state, after, alpha))
        state = after


def test_a_step_that_rounding_hides_counts_as_none() -> None:
    before, after = {"s": torch.zeros(3)}, {"s": torch.full((3,), 1e-7)}
    assert not momentum.velocity([(before, after, 1e-9)], 0.5)["s"].any()


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0])
def test_a_momentum_is_from_zero_to_one(value: float) -> None:
    with pytest.raises(Rejected, match="momentum"):
        merging.check(MergeSpec("mean@1", (("momentum", value),)))
    merging.check(MergeSpec("mean@1", (("momentum", 0.9), ("norm_clip", 2.0))))
