"""Which of a round's patches are copies: the same answer for everybody, whatever was done to hide them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2pmodel.domain.ids import PatchId
from p2pmodel.logic.copies import copies
from p2pmodel.tensors.changes import Change
from p2pmodel.tensors.merging import likeness
from p2pmodel.wire import canonical

NAMES = tuple(canonical.digest(str(number).encode()) for number in range(5))
PARENT = {"a": torch.ones(300, 40), "b": torch.zeros(77)}
CHANCE = torch.Generator().manual_seed(0)
A, B, C = ({name: torch.randn(x.shape, generator=CHANCE) for name, x in PARENT.items()} for _ in range(3))
State = dict[str, Tensor]


def moved(update: State, by: float = 1.0, noise: float = 0.0) -> Change:
    moved = {name: x + by * (update[name] + noise * C[name]) for name, x in PARENT.items()}
    return Change(moved, relative=False, fisher_places=())


def found(*changes: Change) -> dict[PatchId, PatchId]:
    patches = NAMES[: len(changes)]
    sketches = likeness.Sketches(PARENT, zip(patches, changes, strict=True))
    return copies(patches, sketches.cosines)


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(moved(A), id="the same"),
        pytest.param(moved(A, 20.0), id="longer"),
        pytest.param(moved(A, 0.01), id="shorter"),
        pytest.param(moved(A, noise=0.02), id="disturbed"),
        pytest.param(Change(A, relative=True, fisher_places=()), id="as updates"),
    ],
)
def test_the_later_one_is_the_copy(copy: Change) -> None:
    assert found(moved(A), moved(B), copy) == {NAMES[2]: NAMES[0]}
    assert found(copy, moved(B), moved(A)) == {NAMES[2]: NAMES[0]}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(moved(A, -1.0), id="against it"),
        pytest.param(moved(A, noise=0.1), id="much disturbed"),
        pytest.param(moved(A, 0.0), id="no change"),
        pytest.param(Change({"b": A["b"]}, relative=True, fisher_places=()), id="a part"),
    ],
)
def test_others_are_none(other: Change) -> None:
    assert found(moved(A), other, moved(B)) == found(other, moved(B), moved(A)) == {}


def test_a_sketch_does_not_depend_on_how_much_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = likeness.Sketches(PARENT, [(NAMES[0], moved(A)), (NAMES[1], moved(B))])
    monkeypatch.setattr(likeness, "_COLUMNS", 1000)
    parts = likeness.Sketches(PARENT, [(NAMES[0], moved(A)), (NAMES[1], moved(B))])
    assert parts.cosines(NAMES[0], NAMES[1:2]) == whole.cosines(NAMES[0], NAMES[1:2])


def test_a_copy_that_does_not_enter_drives_nobody_out() -> None:
    changes = (moved(A, 50.0), moved(A), moved(B), moved(A, 0.5), moved(A, 2.0))
    sketches = likeness.Sketches(PARENT, zip(NAMES, changes, strict=True))
    asked: list[PatchId] = []

    def enters(patch: PatchId) -> bool:
        asked.append(patch)
        return patch != NAMES[0]

    assert copies(NAMES, sketches.cosines, enters) == {NAMES[3]: NAMES[1], NAMES[4]: NAMES[1]}
    assert asked == list(NAMES[:3])
    assert copies(NAMES, sketches.cosines, lambda patch: False) == {}


def test_lengths_are_those_of_the_updates() -> None:
    sketches = likeness.Sketches(PARENT, zip(NAMES, (moved(A), moved(A, 50.0), moved(A, 0.0)), strict=False))
    true = float(torch.cat([A[name].flatten() for name in PARENT]).norm())
    assert sketches.lengths[NAMES[0]] == pytest.approx(true, rel=0.1)
    assert sketches.lengths[NAMES[1]] == pytest.approx(50 * sketches.lengths[NAMES[0]])
    assert sketches.lengths[NAMES[2]] == 0


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_whether_there_are_any_does_not_depend_on_the_order(pairs: set[tuple[int, int]]) -> None:
    alike = {frozenset((NAMES[one], NAMES[other])) for one, other in pairs}
    results = []
    for order in itertools.permutations(NAMES):
        left = copies(order, lambda patch, kept: [float(frozenset((patch, other)) in alike) for other in kept])
        kept = set(NAMES) - left.keys()
        assert not any(pair <= kept for pair in alike if len(pair) == 2)
        results.append(bool(left))
    assert len(set(results)) == 1
