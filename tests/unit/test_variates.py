"""The mean of control variates: closed forms, what a liar can do, and what comes off the network."""

import pytest
import torch

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob, control, fourbit
from p2pmodel.tensors.variates import Variate, read_mean, write_mean
from p2pmodel.wire import canonical

SLOTS = (Slot("ia3:out:a", (4,), "float32"), Slot("ia3:out:b", (3,), "float32"), Slot("weight:w", (2, 2), "float32"))
KINDS = ("ia3@1", "dense@1")
LIMIT = 1 << 20


def variate(number: int, value: float, kind: str = "ia3@1", weight: float = 1.0) -> Variate:
    names = [slot for slot in SLOTS if slot.name.startswith("ia3:" if kind == "ia3@1" else "weight:")]
    gradient = {slot.name: torch.full(slot.shape, value) for slot in names}
    return Variate(canonical.digest(str(number).encode()), kind, gradient, weight)


def mean_of(*variates: Variate) -> dict[str, torch.Tensor]:
    raw = write_mean(sorted(variates, key=lambda v: v.patch), KINDS, SLOTS)
    assert raw is not None
    return read_mean(raw, KINDS, SLOTS, LIMIT)


def test_it_is_the_weighted_mean_of_each_kinds_own() -> None:
    mean = mean_of(variate(0, 1.0), variate(1, 2.0, weight=3.0), variate(2, -4.0, "dense@1"))
    torch.testing.assert_close(mean["ia3:out:a"], torch.full((4,), 1.75), rtol=1e-2, atol=0)
    torch.testing.assert_close(mean["weight:w"], torch.full((2, 2), -4.0), rtol=1e-2, atol=0)


def test_a_kind_without_any_has_no_mean() -> None:
    assert mean_of(variate(0, 1.0)).keys() == {"ia3:out:a", "ia3:out:b"}


def test_half_a_kind_is_refused() -> None:
    raw = blob.pack({"ia3:out:a": torch.ones(4, dtype=torch.bfloat16)})
    with pytest.raises(Rejected, match="all slots"):
        read_mean(raw, KINDS, SLOTS, LIMIT)


def test_no_control_variate_is_no_mean() -> None:
    assert write_mean([], KINDS, SLOTS) is None
    assert write_mean([variate(0, 1.0, weight=0.0)], KINDS, SLOTS) is None


def test_a_liar_moves_the_mean_by_no_more_than_the_clipped_norm() -> None:
    honest = [variate(number, 1.0) for number in range(4)]
    mean = mean_of(*honest, variate(9, -1e6))["ia3:out:a"]
    torch.testing.assert_close(mean, torch.full((4,), (4 - 3) / 5), rtol=1e-2, atol=0)


def test_a_mean_that_its_blob_could_not_hold_is_refused() -> None:
    with pytest.raises(Rejected, match="too large"):
        mean_of(variate(0, torch.finfo(torch.float32).max))
    assert float(mean_of(variate(0, control.LARGEST))["ia3:out:a"][0]) == control.LARGEST


def test_no_control_variate_is_larger_than_a_mean_of_them_may_be() -> None:
    places = (("a", (4,)),)
    for value, is_read in ((control.LARGEST * 0.99, True), (torch.finfo(torch.float32).max, False)):
        raw = blob.pack(fourbit.encode({"a": torch.tensor([0.0, value, -value, 1.0])})[0])
        if is_read:
            assert float(control.read(raw, places, LIMIT)["a"][1]) > 1e38
        else:
            with pytest.raises(Rejected, match="no gradient has"):
                control.read(raw, places, LIMIT)


def test_another_shape_or_what_is_not_finite_is_refused() -> None:
    wrong = Variate(canonical.digest(b"w"), "ia3@1", {"ia3:out:a": torch.ones(5)}, 1.0)
    with pytest.raises(Rejected):
        mean_of(wrong)
    with pytest.raises(Rejected):
        mean_of(variate(0, float("inf")))
    with pytest.raises(Rejected):
        read_mean(b"nothing", KINDS, SLOTS, LIMIT)
