"""What a note of a step may say of the experts that routers chose."""

import pytest
import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.swarm import StepNote
from p2pmodel.engine.steps import MAX_SPREAD, Note
from p2pmodel.wire import canonical

NAN, INF = float("nan"), float("inf")


def test_shares_arrive_as_they_were() -> None:
    shares = torch.tensor([[0.5, 2.5], [3.0, 0.0]])
    note = Note.decode(Note(routed=3, shares=shares, spread=4).encode(), 2, 5)
    assert note.shares is not None
    assert torch.equal(note.shares, shares)
    assert (note.routed, note.spread) == (3, 4)


def test_sums_of_many_layers_shares_are_shares() -> None:
    total = torch.zeros(4, 9)
    for _ in range(200):
        total = total + torch.randn(4, 9).mul(5).softmax(1)
    assert Note.decode(Note(routed=200, shares=total).encode(), 4, 1).routed == 200


@pytest.mark.parametrize(
    "row", [[NAN, 0.0], [INF, 0.0], [-INF, 1.0], [-0.01, 0.5], [1.5, 1.0], [2.1, 0.0], [3e38, 3e38]], ids=str
)
def test_shares_that_no_routers_gave_are_refused(row: list[float]) -> None:
    shares: Tensor = torch.tensor([[1.0, 1.0], row])
    with pytest.raises(Rejected, match="shares") as caught:
        Note.decode(Note(routed=2, shares=shares).encode(), 2, 5)
    assert caught.value.reason == "frame"


@pytest.mark.parametrize(
    "note", [StepNote(spread=MAX_SPREAD + 1), StepNote(spread=-1), StepNote(routed=10_001)], ids=str
)
def test_counts_that_no_step_has_are_refused(note: StepNote) -> None:
    with pytest.raises(Rejected):
        Note.decode(canonical.encode(note), 2, 5)
