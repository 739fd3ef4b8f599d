"""The diagonal Fisher: closed forms of small models."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2pmodel.tensors.fisher import diagonal_fisher, sample_labels


def squared_error(rows: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """½·(w·x)² of each row, whose gradient in w is (w·x)·x."""
    return 0.5 * (rows["w"] * x).sum(1).square()


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 100))
def test_it_is_the_mean_of_squared_gradients_of_each_example(examples: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(examples, 3, generator=generator), torch.randn(3, generator=generator)
    fisher = diagonal_fisher(squared_error, {"w": w}, torch.split(x, batch))
    expected = ((x @ w)[:, None] * x).square().mean(0)
    torch.testing.assert_close(fisher["w"], expected, rtol=1e-4, atol=1e-6)
    assert fisher["w"].dtype == torch.float32


def test_gradients_that_cancel_are_not_forgotten() -> None:
    x = torch.tensor([[1.0], [-1.0]])
    fisher = diagonal_fisher(lambda rows, x: (rows["w"] * x).sum(1), {"w": torch.ones(1)}, [x])
    assert fisher["w"].tolist() == [1.0]


def test_what_takes_no_part_has_no_mass() -> None:
    state = {"w": torch.ones(2), "unused": torch.ones(3)}
    fisher = diagonal_fisher(lambda rows, x: rows["w"].sum(1), state, [torch.ones(4)])
    assert fisher["unused"].tolist() == [0.0] * 3


def test_the_state_is_left_alone() -> None:
    w = torch.ones(1)
    diagonal_fisher(lambda rows, x: rows["w"].sum(1), {"w": w}, [torch.ones(4)])
    assert w.grad is None
    assert not w.requires_grad


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="example"):
        diagonal_fisher(lambda rows, x: x, {"w": torch.ones(1)}, [])


def test_a_bernoulli_has_the_fisher_of_a_bernoulli() -> None:
    """Of a logit z: p·(1 − p), when labels are sampled from the model."""
    generator = torch.Generator().manual_seed(0)

    def losses(rows: Mapping[str, Tensor], x: Tensor) -> Tensor:
        logits = torch.cat([torch.zeros_like(rows["z"]), rows["z"]], 1)
        return torch.nn.functional.cross_entropy(logits, sample_labels(logits, generator), reduction="none")

    p = torch.sigmoid(torch.tensor(1.0)).item()
    fisher = diagonal_fisher(losses, {"z": torch.ones(1)}, [torch.zeros(5000)] * 4)
    assert fisher["z"].item() == pytest.approx(p * (1 - p), rel=0.05)


def test_labels_follow_the_seed_and_the_distribution() -> None:
    logits = torch.tensor([0.0, 100.0, 0.0]).expand(2, 4, 3)
    assert sample_labels(logits, torch.Generator().manual_seed(0)).tolist() == [[1] * 4] * 2
    flat = torch.zeros(50, 9)
    first, second = (sample_labels(flat, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(set(first.tolist())) > 3
