"""Which part of a selection is proposed when the whole of it gains nothing."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.ids import PatchId
from p2pmodel.node.rounds.selecting import Fit, Selection, fit
from p2pmodel.wire import canonical

PATCHES = tuple(canonical.digest(str(number).encode()) for number in range(20))


class Merging:
    """Gains without any of `ruinous`; without finite values when that is what they do."""

    def __init__(self, ruinous: set[PatchId], finite: bool) -> None:
        self.ruinous, self.finite, self.merges = ruinous, finite, 0

    def __call__(self, patches: Sequence[PatchId]) -> Fit | None:
        self.merges += 1
        gains = not self.ruinous.intersection(patches)
        return Fit((), {}, 1.0, gains) if gains or self.finite else None


def selection(lengths: Sequence[float]) -> Selection:
    """The last one is an expert, which has no length."""
    entering = PATCHES[: len(lengths) + 1]
    return Selection(entering, (), dict(zip(entering, lengths, strict=False)), ())


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=15), st.integers(1, 4), st.booleans())
def test_what_ruins_a_merge_and_is_long_is_left_out_and_nothing_else(
    lengths: list[float], long: int, finite: bool
) -> None:
    whole = selection([*[100.0] * long, *lengths])
    merging = Merging(set(whole.entering[:long]), finite)
    found = fit(whole, merging)
    assert found is not None
    assert found[1].gains
    assert found[0].entering == whole.entering[long:]
    assert {entry.patch for entry in found[0].left_out} == merging.ruinous
    assert all("gains nothing with it" in entry.reason for entry in found[0].left_out)
    assert merging.merges <= 1 + (len(lengths) + long).bit_length()


def test_where_all_gains_it_is_merged_once() -> None:
    merging = Merging(set(), True)
    found = fit(selection([3.0, 1.0, 2.0]), merging)
    assert found is not None
    assert found[0].entering == PATCHES[:4]
    assert merging.merges == 1


def test_where_nothing_gains_the_whole_is_proposed_unless_it_is_no_numbers() -> None:
    whole = selection([3.0, 1.0, 2.0])
    found = fit(whole, Merging(set(whole.entering), True))
    assert found is not None
    assert found[0] is whole
    assert fit(whole, Merging(set(whole.entering), False)) is None


def test_a_patch_alone_is_not_taken_apart() -> None:
    merging = Merging({PATCHES[0]}, True)
    alone = Selection(PATCHES[:1], (), {}, ())
    assert fit(alone, merging) is not None
    assert merging.merges == 1
