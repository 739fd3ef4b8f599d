"""Fishers in a byte a value, and gradients in four bits: what comes back, and what is refused."""

import math
from collections.abc import Mapping
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors import blob, compact, fourbit
from p2pmodel.tensors.changes import end_to_end

LIMIT = 1 << 20
fishers = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40).map(torch.tensor)
values = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200).map(torch.tensor)


def there_and_back(fisher: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return compact.Decoded(blob.pack(compact.encode(fisher)), end_to_end(fisher)[1], LIMIT)


@given(fishers)
def test_a_fisher_comes_back_within_five_percent_or_at_the_end_of_the_scale(fisher: Tensor) -> None:
    back = there_and_back({"s": fisher})["s"]
    lowest = fisher.max().double() * 2 ** (-254 / 8)
    exact = fisher.double()
    assert bool(((fisher == 0) <= (back == 0)).all())
    within = (back.double() - exact).abs() <= 0.0455 * exact + 2e-45
    assert bool((within | (exact < lowest)).all())
    assert back.max() == fisher.max()


def test_what_has_mass_keeps_some_whatever_lies_beside_it() -> None:
    back = there_and_back({"s": torch.tensor([1.0, 1e-30, 0.0])})["s"]
    assert (back > 0).tolist() == [True, True, False]


def test_tensors_come_back_in_their_places_across_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    fisher = {
        "b": torch.rand(40, 50, generator=generator) * 1e-9,
        "a": torch.rand(1500, generator=generator),
        "c": torch.zeros(3),
    }
    encoded = compact.encode(fisher)
    assert encoded["codes"].dtype == torch.uint8
    assert encoded["codes"].shape == (3503,)
    assert encoded["scales"].shape == (4,)
    back = there_and_back(fisher)
    assert list(back) == ["a", "b", "c"]
    for name, tensor in fisher.items():
        torch.testing.assert_close(back[name], tensor, rtol=0.0455, atol=1e-9 if name == "b" else 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codes": torch.zeros(4, dtype=torch.uint8)}, "shape"),
        ({"codes": torch.zeros(5, dtype=torch.int8)}, "shape"),
        ({"scales": torch.tensor([-1.0])}, "finite"),
        ({"scales": torch.tensor([-0.0])}, "finite"),
        ({"scales": torch.tensor([math.inf])}, "finite"),
        ({"scales": torch.ones(2)}, "shape"),
        ({"scales": None}, "schema"),
        ({"more": torch.ones(1)}, "schema"),
    ],
)
def test_hostile_fishers_are_refused(change: dict[str, Tensor | None], reason: str) -> None:
    fisher = {"s": torch.ones(5)}
    tensors = {**compact.encode(fisher), **change}
    raw = blob.pack({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(Rejected) as refused:
        compact.Decoded(raw, (("s", (5,)),), LIMIT)
    assert refused.value.reason == reason


@given(values)
def test_four_bits_are_within_half_a_step_of_their_block(flat: Tensor) -> None:
    encoded, error = fourbit.encode({"s": flat})
    back = fourbit.Decoded(blob.pack(encoded), (("s", tuple(flat.shape)),), LIMIT)["s"]
    torch.testing.assert_close(back + error["s"], flat, rtol=1e-5, atol=float(flat.abs().max()) * 1e-6)
    for at in range(0, len(flat), fourbit.BLOCK):
        block = slice(at, at + fourbit.BLOCK)
        largest = float(flat[block].abs().max())
        # What a scale of a block can be, and what a float32 can be without losing digits.
        smallest = float(flat.abs().max()) * 1e-7 + torch.finfo(torch.float32).tiny
        assert float(error["s"][block].abs().max()) <= 0.51 * largest / 7 + smallest


def test_four_bits_take_four_and_a_quarter() -> None:
    tensors = {"a": torch.randn(64, 63), "b": torch.randn(5)}
    encoded, _ = fourbit.encode(tensors)
    count = 64 * 63 + 5
    size = sum(t.numel() * t.element_size() for t in encoded.values())
    assert size == -(-count // 2) + 2 * -(-count // 64) + 4
    back = fourbit.Decoded(blob.pack(encoded), end_to_end(tensors)[1], LIMIT)
    assert float((back["a"] - tensors["a"]).norm() / tensors["a"].norm()) < 0.15
    assert back["b"].shape == (5,)


def test_the_error_that_is_fed_back_is_not_lost() -> None:
    """The sum of many encodings of the same small gradient is that of the gradient."""
    gradient = {"s": torch.tensor([1.0, 0.03, -0.01, 0.0])}
    total, error = torch.zeros(4), None
    for _ in range(100):
        encoded, error = fourbit.encode(gradient, error)
        total += fourbit.Decoded(blob.pack(encoded), (("s", (4,)),), LIMIT)["s"]
    torch.testing.assert_close(total, 100 * gradient["s"], rtol=0, atol=0.1)


def test_small_gradients_do_not_vanish() -> None:
    gradient = {"s": torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e-12}
    encoded, _ = fourbit.encode(gradient)
    back = fourbit.Decoded(blob.pack(encoded), (("s", (64,)),), LIMIT)["s"]
    assert float((back - gradient["s"]).norm() / gradient["s"].norm()) < 0.15


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        fourbit.encode({"s": torch.tensor([math.nan])})
    encoded, _ = fourbit.encode({"s": torch.ones(3)})
    for change in ({"unit": torch.tensor([math.inf])}, {"scales": torch.full((2,), 1.0, dtype=torch.float16)}):
        with pytest.raises(Rejected):
            fourbit.Decoded(blob.pack({**encoded, **change}), (("s", (3,)),), LIMIT)


@given(st.integers(1, 3000), st.randoms(use_true_random=False))
def test_parts_are_those_of_the_whole(size: int, random: Random) -> None:
    flat = {"a": torch.rand(size // 2), "b": torch.rand(size - size // 2)}
    _, places = end_to_end(flat)
    for found in (
        compact.Decoded(blob.pack(compact.encode(flat)), places, LIMIT),
        fourbit.Decoded(blob.pack(fourbit.encode(flat)[0]), places, LIMIT),
    ):
        whole = found.across(0, size)
        torch.testing.assert_close(torch.cat([found["a"], found["b"]]), whole, rtol=0, atol=0)
        low = random.randrange(size + 1)
        high = random.randrange(low, size + 1)
        torch.testing.assert_close(found.across(low, high), whole[low:high], rtol=0, atol=0)


def test_a_zero_with_a_sign_comes_back_as_none() -> None:
    back = there_and_back({"s": torch.tensor([-0.0, -0.0])})["s"]
    assert not bool(torch.signbit(back).any())
