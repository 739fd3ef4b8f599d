"""The diagonal Fisher: closed forms of small models."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from p2pmodel.tensors import dense
from p2pmodel.tensors.fisher import sample_labels
from p2pmodel.tensors.weights import Ground, find_slots, initial

SLOT = "weight:layers.0.weight"


def trainee_of(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], dense.Trainee]:
    """weight [O, I] -> (a linear layer, its trainee)."""
    base = nn.Module()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    base.layers = nn.ModuleList([linear])
    base.requires_grad_(False)
    return linear, dense.Trainee(Ground(base, initial(find_slots(base))))


@given(st.integers(1, 7), st.integers(0, 100))
def test_it_is_the_sum_of_squared_gradients_of_each_example(examples: int, seed: int) -> None:
    """Of ½·(w·x)², whose gradient in w is (w·x)·x."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(examples, 3, generator=generator), torch.randn(1, 3, generator=generator)
    linear, trainee = trainee_of(w)
    squares = trainee.squared_gradients(lambda part: 0.5 * linear(x[part]).square().sum(1), examples)
    expected = ((x @ w.T) * x).double().square().sum(0)
    torch.testing.assert_close(squares[SLOT + "#columns"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(squares[SLOT + "#rows"], expected.mean()[None], rtol=1e-4, atol=1e-6)
    assert all(total.dtype == torch.float64 for total in squares.values())


def test_gradients_that_cancel_are_not_forgotten() -> None:
    x = torch.tensor([[1.0], [-1.0]])
    linear, trainee = trainee_of(torch.ones(1, 1))
    squares = trainee.squared_gradients(lambda part: linear(x[part]).sum(1), 2)
    assert squares[SLOT + "#rows"].tolist() == [2.0]


def test_what_takes_no_part_has_no_mass() -> None:
    _, trainee = trainee_of(torch.ones(2, 2))
    leaf = torch.ones(3, requires_grad=True)
    squares = trainee.squared_gradients(lambda part: leaf[part], 3)
    assert all(not bool(total.any()) for total in squares.values())


def test_a_bernoulli_has_the_fisher_of_a_bernoulli() -> None:
    """Of a logit z: p·(1 − p), when labels are sampled from the model."""
    generator = torch.Generator().manual_seed(0)
    linear, trainee = trainee_of(torch.ones(1, 1))

    def losses(part: slice) -> Tensor:
        z = linear(torch.ones(1, 1))
        logits = torch.cat([torch.zeros_like(z), z], 1)
        return nn.functional.cross_entropy(logits, sample_labels(logits, generator), reduction="none")

    p = torch.sigmoid(torch.tensor(1.0)).item()
    fisher = trainee.squared_gradients(losses, 2000)[SLOT + "#rows"].item() / 2000
    assert fisher == pytest.approx(p * (1 - p), rel=0.1)


def test_labels_follow_the_seed_and_the_distribution() -> None:
    logits = torch.tensor([0.0, 100.0, 0.0]).expand(2, 4, 3)
    assert sample_labels(logits, torch.Generator().manual_seed(0)).tolist() == [[1] * 4] * 2
    flat = torch.zeros(50, 9)
    first, second = (sample_labels(flat, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(set(first.tolist())) > 3
