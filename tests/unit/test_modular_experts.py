"""Modular experts: routing once and causally, constant cost, what patches may hold, how experts come together."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.model import Limits, Slot
from p2pmodel.domain.modular import (
    KIND,
    MAX_EXPERTS,
    NONE,
    Expert,
    experts_in,
    is_name,
    max_rank,
    name_like,
    place_of,
    pool_slot,
    removed,
    slots_at,
    slots_of_expert,
    united,
)
from p2pmodel.domain.version import BASE_NUMBER, REMOVE, RESTORE, VersionNumber
from p2pmodel.logic.admission import check_patch, result_limit
from p2pmodel.logic.pooling import pooled
from p2pmodel.tensors import blob
from p2pmodel.tensors.experts import MAX_VALUE, check_parent, merge, new_adapter, read, without_experts
from p2pmodel.tensors.gates import discriminant
from p2pmodel.tensors.merging import Contribution
from p2pmodel.tensors.smear import LEAD, Adapter, Course, norm, pools
from p2pmodel.tensors.smear_hooks import Together
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from tests.support import factories

WIDTH, LIMIT = 12, 1 << 20
POOLS = tuple(pool_slot(f"layers.{index}", WIDTH, max_rank=4) for index in range(2))
LAW, CODE = Expert("law", 3), Expert("code", 2)
A, B = sorted(PatchId(canonical.digest(text)) for text in (b"a", b"b"))


def values(*experts: Expert, seed: int = 0) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    slots = [slot for expert in experts for slot in slots_of_expert(POOLS, expert)]
    return {slot.name: torch.randn(slot.shape, generator=chance) for slot in slots}


def hidden(tokens: int, rows: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def whole(course: Course, given: Tensor) -> Tensor:
    course.begin(0, given.shape[1])
    update = course.update("layers.0", given)
    return torch.zeros_like(given) if update is None else update


def in_parts(course: Course, given: Tensor, cuts: list[int]) -> Tensor:
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, given.shape[1]], strict=True):
        course.begin(begin, end - begin)
        update = course.update("layers.0", given[:, begin:end])
        parts.append(torch.zeros_like(given[:, begin:end]) if update is None else update)
    return torch.cat(parts, dim=1)


def test_the_merged_expert_is_the_average_by_the_routers_shares() -> None:
    pool = pools(values(LAW, CODE))["layers.0"]
    given = hidden(LEAD + 3)
    course = Course({"layers.0": pool})
    update = whole(course, given)
    shares = course.shares["layers.0"]
    assert pool.names == ("code", "law")
    assert shares.shape == (1, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(1))
    seen = norm(norm(given[:, :LEAD]).mean(1))
    scores = torch.stack(
        [(norm(w) * seen[0]).sum() / WIDTH * g[0] + g[1] for w, g in zip(pool.router, pool.gate, strict=True)]
    )
    torch.testing.assert_close(shares[0], torch.cat([scores, torch.zeros(1)]).softmax(0))
    down = sum(share * matrix for share, matrix in zip(shares[0], pool.down, strict=False))
    up = sum(share * matrix for share, matrix in zip(shares[0], pool.up, strict=False))
    expected = torch.nn.functional.gelu(norm(given[:, LEAD:]) @ down.T) @ up
    torch.testing.assert_close(update[:, LEAD:], expected)
    assert torch.equal(update[:, :LEAD], torch.zeros(1, LEAD, WIDTH))


extremes = st.one_of(st.sampled_from([0.0, MAX_VALUE, -MAX_VALUE, 1e-38]), st.floats(-MAX_VALUE, MAX_VALUE, width=32))
wild = st.lists(extremes, min_size=WIDTH, max_size=WIDTH)


@settings(max_examples=60, deadline=None)
@given(wild, wild, st.tuples(extremes, extremes), st.tuples(extremes, extremes))
def test_shares_of_whatever_a_patch_may_hold_are_shares(
    law: list[float], code: list[float], one: tuple[float, float], other: tuple[float, float]
) -> None:
    state = values(LAW, CODE)
    for expert, row, gate in (("law", law, one), ("code", code, other)):
        for pool in POOLS:
            state[f"{pool.name}.{expert}.router"] = torch.tensor(row)
            state[f"{pool.name}.{expert}.gate"] = torch.tensor(gate)
            for part in ("down", "up"):
                state[f"{pool.name}.{expert}.{part}"] *= MAX_VALUE / 8
    assert read(blob.pack(state), POOLS, LIMIT).values.keys() == state.keys()
    given_states = hidden(LEAD + 2) * 1e3
    course = Course(pools(state))
    update = whole(course, given_states)
    shares = course.shares["layers.0"]
    assert bool((shares >= 0).all())
    torch.testing.assert_close(shares.sum(1), torch.ones(1))
    assert bool(update.isfinite().all())


def test_experts_are_in_the_order_of_their_names() -> None:
    names = ("law", "law-us", "law_uk", "law2")
    assert pools(values(*(Expert(name, 2) for name in reversed(names))))["layers.0"].names == tuple(sorted(names))


def test_router_rows_and_gates_beyond_the_bound_are_refused() -> None:
    for part in ("router", "gate", "down", "up"):
        state = values(LAW)
        state[f"{POOLS[0].name}.law.{part}"].view(-1)[0] = -1.01 * MAX_VALUE
        with pytest.raises(Rejected, match="which no expert needs"):
            read(blob.pack(state), POOLS, LIMIT)
        state[f"{POOLS[0].name}.law.{part}"].view(-1)[0] = torch.nan
        with pytest.raises(Rejected, match="finite"):
            read(blob.pack(state), POOLS, LIMIT)


def test_what_is_computed_does_not_grow_with_the_experts() -> None:
    for count in (1, 5, 40):
        pool = pools(values(*(Expert(f"e{index}", 3) for index in range(count))))["layers.0"]
        course = Course({"layers.0": pool})
        whole(course, hidden(LEAD + 1, rows=2))
        adapter = course.settled("layers.0")
        assert adapter is not None
        assert adapter.down.shape == adapter.up.shape == (2, 3, WIDTH)


def test_no_token_is_changed_by_a_later_one() -> None:
    state = pools(values(LAW, CODE))
    given = hidden(LEAD + 6)
    before = whole(Course(state), given)
    for place in (0, LEAD - 1, LEAD, LEAD + 4):
        other = given.clone()
        other[:, place] += 3.0
        after = whole(Course(state), other)
        assert torch.equal(after[:, :place], before[:, :place])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, LEAD + 7), max_size=5, unique=True).map(sorted))
def test_a_prompt_in_pieces_is_routed_as_the_whole(cuts: list[int]) -> None:
    state = pools(values(LAW, CODE))
    given = hidden(LEAD + 8)
    torch.testing.assert_close(in_parts(Course(state), given, cuts), whole(Course(state), given))


def test_a_session_that_goes_back_decides_as_if_it_had_not() -> None:
    state = pools(values(LAW, CODE))
    given = hidden(LEAD + 8)
    expected = whole(Course(state), given)
    course = Course(state)
    wrong = given.clone()
    wrong[:, LEAD - 4 :] += 1.0
    whole(course, wrong)
    course.begin(LEAD - 4, 12)
    update = course.update("layers.0", given[:, LEAD - 4 :])
    torch.testing.assert_close(update, expected[:, LEAD - 4 :])


def test_padding_is_not_seen() -> None:
    state = pools(values(LAW, CODE))
    short, long = hidden(LEAD + 2, seed=2), hidden(LEAD + 7, seed=3)
    rows = torch.cat([torch.nn.functional.pad(short, (0, 0, 5, 0)), long])
    mask = torch.ones(2, LEAD + 7, dtype=torch.bool)
    mask[0, :5] = False
    course = Course(state)
    updates = []
    for begin, end in ((0, 20), (20, LEAD + 6), (LEAD + 6, LEAD + 7)):
        course.begin(begin, end - begin, mask[:, begin:end])
        update = course.update("layers.0", rows[:, begin:end])
        updates.append(torch.zeros_like(rows[:, begin:end]) if update is None else update)
    found = torch.cat(updates, dim=1)
    torch.testing.assert_close(found[:1, 5:], whole(Course(state), short))
    torch.testing.assert_close(found[1:], whole(Course(state), long))
    course.reorder(torch.tensor([1, 1]))
    course.begin(LEAD + 7, 1)
    again = course.update("layers.0", rows[1:, -1:].expand(2, -1, -1))
    assert again is not None
    torch.testing.assert_close(again[0], again[1])


@pytest.mark.parametrize("cuts", [[3], [2, 9], [LEAD - 1], [LEAD], [LEAD + 1], [4, LEAD + 2]])
def test_padding_may_come_after_steps_without_any(cuts: list[int]) -> None:
    state = pools(values(LAW, CODE))
    short, long = hidden(LEAD + 4, seed=2), hidden(LEAD + 6, seed=3)
    gap = cuts[-1]
    rows = torch.cat([torch.cat([short[:, :gap], torch.ones(1, 2, WIDTH), short[:, gap:]], dim=1), long])
    mask = torch.ones(2, LEAD + 6, dtype=torch.bool)
    mask[0, gap : gap + 2] = False
    course = Course(state)
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, LEAD + 6], strict=True):
        course.begin(begin, end - begin, mask[:, begin:end] if begin == gap else None)
        update = course.update("layers.0", rows[:, begin:end])
        parts.append(torch.zeros_like(rows[:, begin:end]) if update is None else update)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(torch.cat([found[:1, :gap], found[:1, gap + 2 :]], dim=1), whole(Course(state), short))
    torch.testing.assert_close(found[1:], whole(Course(state), long))


def test_sessions_of_different_versions_share_a_batch() -> None:
    states = [pools(values(LAW)), pools(values(LAW, CODE, seed=5)), {}]
    prompts = [hidden(LEAD + 4, seed=7), hidden(LEAD - 2, seed=8), hidden(9, seed=9)]
    courses = [Course(state) if state else None for state in states]
    last = torch.cat([hidden(1, seed=10 + index) for index in range(3)])
    alone = []
    for course, prompt, token in zip(courses, prompts, last, strict=True):
        if course is None:
            alone.append(torch.zeros(1, WIDTH))
            continue
        whole(course, prompt)
        expected = whole(Course(course.pools), torch.cat([prompt, token[None]], dim=1))[:, -1]
        alone.append(expected)
        course.begin(prompt.shape[1], 1)
    together = Together(courses, [slice(index, index + 1) for index in range(3)]).update("layers.0", last)
    assert together is not None
    torch.testing.assert_close(together[:, 0], torch.cat(alone))


def test_adapters_of_two_ranks_stand_in_one_batch() -> None:
    parts = [Adapter(torch.randn(1, rank, WIDTH), torch.randn(1, rank, WIDTH)) for rank in (2, 5)]
    given = hidden(1, rows=2)
    expected = torch.cat([part.update(given[row : row + 1]) for row, part in enumerate(parts)])
    torch.testing.assert_close(Adapter.stacked(parts).update(given), expected)


def test_a_row_is_found_that_tells_texts_apart() -> None:
    chance = torch.Generator().manual_seed(0)
    centre = torch.randn(WIDTH, generator=chance)
    own = norm(0.6 * torch.randn(60, WIDTH, generator=chance) + centre)
    other = norm(0.6 * torch.randn(40, WIDTH, generator=chance) - centre)
    gate = discriminant(own, other)
    state = {**new_adapter(POOLS[:1], LAW), **gate.slots("layers.0", "law")}
    pool = pools(state)["layers.0"]
    assert float(pool.scores(own)[:, 0].min()) > 0 > float(pool.scores(other)[:, 0].max())
    assert bool((pool.scores(own)[:, 1] == 0).all())


def test_slots_follow_from_the_experts() -> None:
    found = slots_at(POOLS, (CODE, LAW))
    assert [slot.name for slot in found] == sorted(slot.name for slot in found)
    assert len(found) == 2 * 2 * 4
    assert experts_in({slot.name: slot.shape for slot in found}) == (CODE, LAW)
    assert max_rank(POOLS[0]) == 4
    assert sum(torch.Size(slot.shape).numel() for slot in slots_of_expert(POOLS[:1], Expert("e", 4))) <= 10 * WIDTH
    place = place_of("expert:layers.1.experts.law.down")
    assert place is not None
    assert (place.layer, place.expert, place.part) == ("layers.1", "law", "down")
    assert place_of("expert:layers.1.experts.law.weight") is None
    assert place_of("ia3:out:layers.1.k_proj") is None
    assert [is_name(text) for text in ("Law", NONE, "a.b", "law-2")] == [False, False, False, True]
    assert name_like("My Notes (3)") == "my-notes-3"


BAD = {
    "no-slot": ({"expert:layers.7.experts.law.down": torch.zeros(3, WIDTH)}, "schema"),
    "no-part": ({"expert:layers.0.experts.law.weight": torch.zeros(3, WIDTH)}, "schema"),
    "rank": ({"expert:layers.0.experts.law.down": torch.zeros(5, WIDTH)}, "shape"),
    "ranks": (
        {
            "expert:layers.0.experts.law.down": torch.zeros(3, WIDTH),
            "expert:layers.0.experts.law.up": torch.zeros(2, WIDTH),
        },
        "shape",
    ),
    "width": ({"expert:layers.0.experts.law.router": torch.zeros(WIDTH + 1)}, "shape"),
    "dtype": ({"expert:layers.0.experts.law.router": torch.zeros(WIDTH, dtype=torch.float64)}, "shape"),
    "huge": ({"expert:layers.0.experts.law.gate": torch.tensor([3e38, 1.0])}, "finite"),
    "nothing": ({}, "shape"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_blob_of_other_slots_is_refused(case: str) -> None:
    tensors, reason = BAD[case]
    with pytest.raises(Rejected) as caught:
        read(blob.pack(tensors), POOLS, LIMIT)
    assert caught.value.reason == reason


def test_a_patch_stands_on_its_parents_experts() -> None:
    change = read(blob.pack(values(LAW)), POOLS, LIMIT)
    assert check_parent(change, POOLS, ()) == (LAW,)
    assert check_parent(change, POOLS, (CODE, LAW)) == ()
    with pytest.raises(Rejected, match="rank 4, but the patch's has 3"):
        check_parent(change, POOLS, (Expert("law", 4),))
    for only in ("down", "up"):
        half = read(blob.pack({n: t for n, t in values(LAW).items() if n.endswith(only)}), POOLS, LIMIT)
        assert check_parent(half, POOLS, (CODE, LAW)) == ()
        for rank in (1, 2, 4):
            with pytest.raises(Rejected, match=f"rank {rank}, but the patch's has 3"):
                check_parent(half, POOLS, (Expert("law", rank),))
    rows = read(blob.pack({n: t for n, t in values(LAW).items() if n.endswith("router")}), POOLS, LIMIT)
    assert check_parent(rows, POOLS, (LAW,)) == ()
    with pytest.raises(Rejected, match="'law', which its parent version lacks"):
        check_parent(rows, POOLS, (CODE,))
    part = {n: t for n, t in values(LAW).items() if not n.endswith("1.experts.law.gate")}
    with pytest.raises(Rejected, match="without 'expert"):
        check_parent(read(blob.pack(part), POOLS, LIMIT), POOLS, ())


def test_what_one_patch_holds_goes_in_as_it_is_and_two_are_merged_by_fisher() -> None:
    law, code, other = values(LAW), values(CODE), values(LAW, seed=4)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in {**law, **code}.items()}
    found = merge({}, [Contribution(A, law, nothing, 1.0), Contribution(B, code, nothing, 1.0)])
    assert found.keys() == {**law, **code}.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in {**law, **code}.items())
    parent = values(LAW, seed=9)
    ones = {name: torch.ones_like(tensor) for name, tensor in law.items()}
    twice = {name: 1.5 * tensor for name, tensor in ones.items()}
    found = merge(parent, [Contribution(A, law, ones, 1.0), Contribution(B, other, twice, 1.0)])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (law[name] + 1.5 * other[name]) / 2.5)
    assert without_experts({**law, **code, "ia3:x": torch.ones(1)}, (CODE,)).keys() == {*code, "ia3:x"}


def test_numbers_say_whether_structure_changed() -> None:
    merged = factories.candidate()
    assert BASE_NUMBER.after((), (LAW,)) == VersionNumber(1, 1, 0)
    assert VersionNumber(1, 1, 3).after((LAW,), (LAW,)) == VersionNumber(1, 1, 4)
    grown = replace(merged, experts=(LAW,), number=VersionNumber(1, 1, 0))
    assert not grown.misfit(BASE_NUMBER, ())
    assert "has to be 1.0.1" in grown.misfit(BASE_NUMBER, (LAW,))
    assert "lacks an expert" in replace(grown, experts=()).misfit(BASE_NUMBER, (LAW,))
    smaller = replace(grown, merge=REMOVE, patches=(), left_out=(), weights=(), control=None, experts=())
    assert not smaller.misfit(BASE_NUMBER, (LAW,))
    assert "removes no expert" in smaller.misfit(BASE_NUMBER, ())
    back = replace(smaller, merge=RESTORE)
    assert not back.misfit(BASE_NUMBER, (LAW,))
    with pytest.raises(ValueError, match="unique, sorted"):
        replace(grown, experts=(LAW, CODE))
    assert united((LAW,), [CODE, Expert("law", 9)]) == (CODE, LAW)
    assert removed((CODE,), (CODE, LAW)) == ("law",)


def test_a_round_brings_each_expert_once() -> None:
    both = pooled((), [(A, (LAW,)), (B, (LAW,))])
    assert both.experts == (LAW,)
    assert not both.left_out
    clash = pooled((), [(A, (LAW,)), (B, (Expert("law", 2),))])
    assert clash.experts == (LAW,)
    assert [left.patch for left in clash.left_out] == [B]
    full = tuple(sorted(Expert(f"e{index}", 1) for index in range(MAX_EXPERTS)))
    assert [left.patch for left in pooled(full, [(A, (LAW,))]).left_out] == [A]


def test_an_expert_larger_than_the_limit_is_refused() -> None:
    key = Key.generate()
    manifest = replace(factories.manifest(key), kinds=(KIND,), slots=POOLS, limits=Limits(max_patch_bytes=8))
    patch = replace(factories.patch(key), kind=KIND)
    with pytest.raises(Rejected, match="takes 1 to 8") as caught:
        check_patch(patch, manifest, patch.parent, [], model=patch.model)
    assert caught.value.reason == "size"


def test_a_versions_values_may_be_as_large_as_its_experts() -> None:
    grown = replace(factories.manifest(Key.generate()), slots=POOLS)
    assert result_limit(grown, (LAW,)) > result_limit(grown, ())


@pytest.mark.parametrize(
    "slot",
    [
        Slot("expert:layers.0.experts", (10,), "float32"),
        Slot("expert:layers.0.experts", (3, WIDTH), "float32"),
        Slot("expert:layers.0.experts", (1 << 40, WIDTH), "float32"),
        Slot("expert:layers.0.experts.law.down", (10, WIDTH), "float32"),
    ],
    ids=("vector", "no room", "too much room", "no pool"),
)
def test_a_manifests_pool_has_room_for_experts(slot: Slot) -> None:
    key = Key.generate()
    noun = replace(factories.manifest(key), kinds=(KIND,), slots=(slot,))
    with pytest.raises(Rejected, match="no pool of experts") as refused:
        records.open_manifest(key.sign("manifest", noun))
    assert refused.value.reason == "schema"
    good = replace(noun, slots=POOLS)
    assert records.open_manifest(key.sign("manifest", good))[0] == good
