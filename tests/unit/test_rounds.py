"""Rounds: what each event does, that every node ends with the same version, and that none has two."""

import dataclasses
import heapq
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.ids import Digest, PatchId, PeerId, VersionId
from p2pmodel.domain.model import Schedule
from p2pmodel.domain.version import Verdict
from p2pmodel.logic import quorum, rounds
from p2pmodel.logic.rounds import (
    Abandon,
    Adopt,
    CandidateSeen,
    Decided,
    Effect,
    Event,
    Examine,
    Misbehaviour,
    PatchesAdmitted,
    PatchesRefused,
    Phase,
    ProposalFailed,
    Propose,
    Reject,
    RoundRules,
    RoundState,
    Tick,
    VerdictSeen,
)
from p2pmodel.logic.turns import FOLLOWED
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.factories import manifest

MODEL = canonical.digest(b"model")
PATCHES = [PatchId(canonical.digest(bytes([i]))) for i in range(40)]
SCHEDULE = Schedule(min_patches=2, max_patches=5, open_seconds=100.0, proposer_seconds=10.0, verdict_seconds=20.0)


def admitted(*patches: PatchId) -> PatchesAdmitted:
    return PatchesAdmitted(patches)


def peers(count: int) -> tuple[PeerId, ...]:
    return tuple(PeerId(f"12D3KooW{'A' * 43}{letter}") for letter in "BCDEFGHJKL"[:count])


def rules_of(maintainers: int, threshold: int) -> RoundRules:
    return RoundRules(SCHEDULE, peers(maintainers), threshold, MODEL)


def version(text: str) -> VersionId:
    return VersionId(canonical.digest(text.encode()))


def verdict(maintainer: PeerId, of: VersionId, accept: bool = True, round: int = 1) -> VerdictSeen:
    return VerdictSeen(Verdict(maintainer, MODEL, round, of, accept, "", ()))


def run(
    state: RoundState, rules: RoundRules, me: PeerId | None, *events: tuple[float, Event]
) -> tuple[RoundState, list[Effect]]:
    effects: list[Effect] = []
    for now, event in events:
        state, more = rounds.advance(state, event, now, rules, me)
        effects += more
    return state, effects


def ranked(rules: RoundRules, round: int = 1) -> tuple[PeerId, ...]:
    return quorum.proposers(MODEL, round, rules.maintainers)


def opened() -> RoundState:
    return rounds.start(1, VersionId(MODEL), 0.0)


def voting(rules: RoundRules, me: PeerId | None, at: float = 0.0) -> tuple[RoundState, list[Effect]]:
    proposer = ranked(rules)[0]
    return run(
        opened(), rules, me, (at, admitted(PATCHES[0])), (at, CandidateSeen(version("a"), proposer, (PATCHES[0],), 1))
    )


def test_patches_that_were_waiting_are_all_in_the_round_that_they_seal() -> None:
    rules = rules_of(3, 2)
    state, effects = run(opened(), rules, ranked(rules)[0], (0.0, admitted(*PATCHES[:4])))
    assert state.phase is Phase.SEALED
    assert effects == [Propose(1, VersionId(MODEL), tuple(sorted(PATCHES[:4])))]


def test_a_round_is_sealed_by_enough_patches_and_the_first_in_rank_proposes() -> None:
    rules = rules_of(3, 2)
    events = [(0.0, admitted(PATCHES[1])), (1.0, admitted(PATCHES[0])), (2.0, admitted(PATCHES[2]))]
    state, effects = run(opened(), rules, ranked(rules)[0], *events)
    assert state.phase is Phase.SEALED
    assert state.late == (PATCHES[2],)
    assert effects == [Propose(1, VersionId(MODEL), tuple(sorted(PATCHES[:2])))]
    assert run(state, rules, ranked(rules)[0], (3.0, Tick()), (300.0, Tick()))[1] == []


def test_a_round_is_sealed_by_time_once_there_is_a_patch() -> None:
    rules = rules_of(1, 1)
    state, _ = run(opened(), rules, None, (99.0, Tick()), (101.0, Tick()))
    assert state.phase is Phase.OPEN
    state, _ = run(opened(), rules, None, (5.0, admitted(PATCHES[0])), (99.0, Tick()))
    assert state.phase is Phase.OPEN
    assert run(state, rules, None, (100.0, Tick()))[0].phase is Phase.SEALED


def test_a_silent_proposer_is_replaced_by_the_next() -> None:
    rules = rules_of(3, 2)
    for rank, me in enumerate(ranked(rules)):
        state, effects = run(opened(), rules, me, *[(0.0, admitted(p)) for p in PATCHES[:2]])
        assert len(effects) == (rank == 0)
        state, effects = run(state, rules, me, (10.0 * rank - 0.1, Tick()))
        assert effects == []
        state, effects = run(state, rules, me, (10.0 * rank + 0.1, Tick()))
        assert len(effects) == (rank > 0)
    state, effects = run(opened(), rules, None, *[(0.0, admitted(p)) for p in PATCHES[:2]], (1000.0, Tick()))
    assert (state.phase, effects) == (Phase.SEALED, [])


def test_a_proposer_that_can_merge_nothing_waits_for_other_patches() -> None:
    rules = rules_of(1, 1)
    me = rules.maintainers[0]
    state, effects = run(opened(), rules, me, *[(0.0, admitted(p)) for p in PATCHES[:3]])
    assert isinstance(effects[0], Propose)
    state, effects = run(state, rules, me, (1.0, PatchesRefused(effects[0].patches)))
    assert (state.phase, state.patches, effects) == (Phase.OPEN, (PATCHES[2],), [])
    state, effects = run(state, rules, me, (2.0, admitted(PATCHES[0])), (2.0, admitted(PATCHES[3])))
    assert effects == [Propose(1, VersionId(MODEL), tuple(sorted(PATCHES[2:4])))]


def test_a_proposer_that_failed_is_asked_again_after_a_while() -> None:
    rules = rules_of(3, 2)
    for rank, me in enumerate(ranked(rules)):
        state, first = run(opened(), rules, me, *[(0.0, admitted(p)) for p in PATCHES[:2]], (10.0 * rank, Tick()))
        state, effects = run(state, rules, me, (50.0, ProposalFailed()), (59.9, Tick()))
        assert effects == []
        assert run(state, rules, me, (60.1, Tick()))[1] == first[-1:]


def test_a_maintainer_examines_one_candidate_a_round() -> None:
    rules = rules_of(3, 2)
    state, effects = voting(rules, rules.maintainers[0])
    assert state.phase is Phase.VOTING
    assert effects == [Examine(version("a"))]
    state, effects = run(
        state, rules, rules.maintainers[0], (1.0, CandidateSeen(version("b"), ranked(rules)[1], (), 1)), (2.0, Tick())
    )
    assert effects == []
    assert rounds.may_sign(state, version("a"), 19.0, rules)
    assert not rounds.may_sign(state, version("b"), 19.0, rules)
    assert not rounds.may_sign(state, version("a"), 20.0, rules)


def test_only_maintainers_examine_propose_and_count() -> None:
    rules = rules_of(3, 2)
    stranger = peers(4)[3]
    state, effects = voting(rules, stranger)
    assert state.phase is Phase.VOTING
    assert effects == []
    for event in (verdict(stranger, version("a")), CandidateSeen(version("b"), stranger, (), 1)):
        assert rounds.advance(state, event, 1.0, rules, stranger) == (state, ())


def test_a_restarted_maintainer_does_not_examine_again() -> None:
    rules = rules_of(3, 2)
    me = rules.maintainers[0]
    state, effects = run(
        opened(),
        rules,
        me,
        (0.0, verdict(me, version("a"))),
        (0.0, CandidateSeen(version("b"), ranked(rules)[0], (), 1)),
    )
    assert (state.phase, effects) == (Phase.VOTING, [])
    assert not rounds.may_sign(state, version("b"), 0.0, rules)
    assert not rounds.may_sign(state, version("a"), 0.0, rules)


def test_verdicts_that_come_before_the_candidate_count() -> None:
    rules = rules_of(3, 2)
    state, effects = run(opened(), rules, None, *[(0.0, verdict(p, version("a"))) for p in rules.maintainers[:2]])
    assert (state.phase, effects) == (Phase.OPEN, [])
    state, effects = run(state, rules, None, (1.0, CandidateSeen(version("a"), rules.maintainers[0], (PATCHES[0],), 1)))
    assert (state.phase, effects) == (Phase.ADOPTED, [Adopt(version("a"))])
    assert run(state, rules, None, (2.0, verdict(rules.maintainers[2], version("a"))))[0] == state


def test_a_round_is_rejected_when_no_version_can_pass() -> None:
    rules = rules_of(3, 2)
    state, _ = voting(rules, None)
    state, effects = run(state, rules, None, (1.0, verdict(rules.maintainers[0], version("a"), False)))
    assert effects == []
    state, effects = run(state, rules, None, (1.0, verdict(rules.maintainers[1], version("a"), False)))
    assert state.phase is Phase.REJECTED
    assert isinstance(effects[0], Reject)


def test_divided_maintainers_reject() -> None:
    rules = rules_of(2, 2)
    state, _ = voting(rules, None)
    _, effects = run(
        state, rules, None, *[(1.0, verdict(p, version(text))) for p, text in zip(rules.maintainers, "ab", strict=True)]
    )
    assert isinstance(effects[0], Reject)


def test_a_round_without_verdicts_is_abandoned_and_its_patches_are_tried_again() -> None:
    rules = rules_of(3, 2)
    state, _ = voting(rules, None)
    state, effects = run(state, rules, None, (1.0, admitted(PATCHES[5])), (29.0, Tick()))
    assert effects == []
    state, effects = run(state, rules, None, (30.0, Tick()))
    assert state.phase is Phase.ABANDONED
    assert isinstance(effects[0], Abandon)
    state = rounds.reopen(state, 31.0)
    both = tuple(sorted((PATCHES[0], PATCHES[5])))
    assert (state.phase, state.round, state.parent, state.patches) == (Phase.OPEN, 2, MODEL, both)


@pytest.mark.parametrize(("maintainers", "threshold", "proposed"), [(1, 1, 1), (3, 2, 2), (5, 3, 2), (5, 4, 3)])
def test_patches_are_given_up_when_more_proposers_failed_with_them_than_can_lie(
    maintainers: int, threshold: int, proposed: int
) -> None:
    rules = rules_of(maintainers, threshold)
    state = opened()
    for round in range(1, proposed + 1):
        of = version(f"of round {round}")
        against = [verdict(each, of, False, round) for each in rules.maintainers]
        state, _ = run(state, rules, None, *[(1.0, admitted(patch)) for patch in PATCHES[:2]])
        assert state.patches == tuple(sorted(PATCHES[:2])), round
        seen = CandidateSeen(of, rules.maintainers[round - 1], (PATCHES[0],), round)
        state, _ = run(state, rules, None, (1.0, seen), *[(2.0, event) for event in against])
        assert state.phase is Phase.REJECTED
        state = rounds.reopen(state, 2.0)
    assert state.patches == (PATCHES[1],)
    assert run(state, rules, None, (3.0, admitted(PATCHES[0])))[0] == state


def test_patches_are_tried_again_when_maintainers_were_divided() -> None:
    rules = rules_of(2, 2)
    state, _ = voting(rules, None)
    divided = [verdict(p, version(text)) for p, text in zip(rules.maintainers, "ab", strict=True)]
    state, _ = run(state, rules, None, *[(1.0, event) for event in divided])
    assert rounds.reopen(state, 2.0).patches == (PATCHES[0],)


def test_a_verdict_that_comes_too_late_still_adopts() -> None:
    rules = rules_of(3, 2)
    state, _ = voting(rules, None)
    state, _ = run(state, rules, None, (1.0, verdict(rules.maintainers[0], version("a"))), (30.0, Tick()))
    late = verdict(rules.maintainers[1], version("a"))
    assert run(state, rules, None, (31.0, late))[1] == [Adopt(version("a"))]
    state, effects = run(rounds.reopen(state, 31.0), rules, None, (32.0, late))
    assert effects == [Adopt(version("a"))]
    assert state.adopted
    assert state.adopted.round == 1
    following = rounds.follow(state, version("a"), state.adopted.round, 33.0)
    assert (following.phase, following.round, following.parent, following.patches) == (Phase.OPEN, 2, version("a"), ())


def seen(text: str, proposer: PeerId, round: int, aside: bool = False) -> CandidateSeen:
    return CandidateSeen(version(text), proposer, () if aside else (PATCHES[0],), round, aside=aside)


def test_a_node_that_is_behind_follows_what_an_honest_maintainer_has_signed() -> None:
    rules = rules_of(3, 2)
    me, *others = rules.maintainers
    far = seen("c", others[0], 700)
    state, effects = run(opened(), rules, me, (0.0, far), (1.0, verdict(others[0], version("c"), round=700)))
    assert (state.phase, effects) == (Phase.OPEN, [])
    state, effects = run(state, rules, me, (2.0, verdict(others[1], version("c"), accept=False, round=700)))
    assert (state.phase, state.round, effects) == (Phase.VOTING, 700, [Examine(version("c"))])


@pytest.mark.parametrize("sealed", [False, True])
def test_a_candidate_a_few_rounds_ahead_is_followed_when_this_round_s_proposers_were_silent(sealed: bool) -> None:
    rules = rules_of(3, 2)
    near, far = seen("near", ranked(rules)[0], 1 + FOLLOWED), seen("far", ranked(rules)[0], 2 + FOLLOWED)
    patches = [(0.0, admitted(patch)) for patch in PATCHES[:2]] if sealed else []
    state, effects = run(opened(), rules, None, *patches, (0.0, near), (0.0, far), (29.9, Tick()))
    assert (state.phase, effects) == (Phase.SEALED if sealed else Phase.OPEN, [])
    assert rounds.next_tick(state, rules, None) == 30.0
    state, _ = run(state, rules, None, (30.0, Tick()))
    assert (state.phase, state.round) == (Phase.VOTING, 1 + FOLLOWED)


def test_a_vote_is_finished_before_a_later_round_is_followed() -> None:
    rules = rules_of(3, 2)
    me, *others = rules.maintainers
    state, effects = voting(rules, me)
    signed = [(16.0, verdict(p, version("c"), accept=p == others[0], round=4)) for p in others]
    state, effects = run(state, rules, me, (15.0, seen("c", others[0], 4)), *signed, (29.9, Tick()))
    assert (state.round, effects) == (1, [])
    state, effects = run(state, rules, me, (30.0, Tick()))
    assert [type(effect) for effect in effects] == [Abandon]
    state, effects = run(rounds.reopen(state, 30.0), rules, me, (30.0, Tick()))
    assert (state.round, effects) == (4, [Examine(version("c"))])
    assert rounds.may_sign(state, version("c"), 34.9, rules)
    assert not rounds.may_sign(state, version("c"), 35.0, rules)


@pytest.mark.parametrize("rank", range(3))
def test_a_candidate_counts_in_its_proposer_s_turn_and_no_sooner(rank: int) -> None:
    rules = rules_of(3, 2)
    garbage = seen("garbage", ranked(rules)[rank], 1)
    state, effects = run(opened(), rules, None, (0.0, garbage), (8.0, Tick()))
    assert (state.phase is Phase.VOTING) == (rank == 0)
    if rank:
        state, effects = run(state, rules, None, *[(9.0, admitted(patch)) for patch in PATCHES[:2]])
        assert (state.phase, effects) == (Phase.SEALED, [])
        assert rounds.next_tick(state, rules, None) == 9.0 + 10.0 * rank
        state, _ = run(state, rules, None, (8.9 + 10.0 * rank, Tick()))
        assert rounds.may_propose(state, 1)
        assert run(state, rules, None, (9.0 + 10.0 * rank, Tick()))[0].phase is Phase.VOTING


def test_who_proposes_what_another_proposed_does_not_take_its_turn() -> None:
    rules = rules_of(3, 2)
    first, *_, last = ranked(rules)
    state, _ = run(opened(), rules, None, (0.0, seen("a", last, 1)), (1.0, seen("a", first, 1)))
    assert state.phase is Phase.VOTING


def test_rounds_that_fail_do_not_make_patches_wait_anew() -> None:
    rules = rules_of(3, 2)
    state, _ = run(opened(), rules, None, (1.0, admitted(PATCHES[5])))
    for round in range(1, 4):
        made = version(f"garbage {round}")
        state, _ = run(state, rules, None, (20.0 * round, CandidateSeen(made, ranked(rules, round)[0], (), round)))
        state, _ = run(state, rules, None, *[(20.0 * round, verdict(p, made, False, round)) for p in rules.maintainers])
        state = rounds.reopen(state, 20.0 * round)
        assert state.round == round + 1
    assert run(state, rules, None, (99.9, Tick()))[0].phase is Phase.OPEN
    assert run(state, rules, None, (100.0, Tick()))[0].phase is Phase.SEALED


def test_a_maintainer_never_signs_twice_in_a_round_that_it_signed_on_another_parent() -> None:
    rules = rules_of(2, 2)
    me = rules.maintainers[0]
    state, _ = run(opened(), rules, me, (0.0, verdict(me, version("z"), round=5)))
    state = rounds.follow(state, version("a"), 3, 1.0)
    state, effects = run(state, rules, me, (2.0, seen("c", rules.maintainers[1], 5)), (22.0, Tick()))
    assert (state.phase, effects) == (Phase.VOTING, [])
    fresh = dataclasses.replace(rounds.follow(state, version("a"), 3, 3.0), signed_round=5)
    sealed, _ = run(fresh, rules, me, *[(4.0, admitted(p)) for p in PATCHES[:2]])
    assert (sealed.phase, sealed.round) == (Phase.SEALED, 6)


def test_two_signatures_in_a_round_are_reported_once_and_kept_bounded() -> None:
    rules = rules_of(3, 2)
    liar = rules.maintainers[0]
    state, effects = run(opened(), rules, None, *[(0.0, verdict(liar, version(f"v{i}"))) for i in range(120)])
    assert effects == [Misbehaviour(liar, version("v0"), version("v1"))]
    assert len(state.votes) == rounds.KEPT_EACH
    state, _ = run(state, rules, None, *[(0.0, CandidateSeen(version(f"c{i}"), liar, (), i)) for i in range(1, 200)])
    assert len(state.candidates) == rounds.KEPT_EACH


def test_patches_are_bounded() -> None:
    rules = rules_of(3, 2)
    state, _ = run(opened(), rules, None, *[(0.0, admitted(p)) for p in PATCHES])
    assert len(state.patches) + len(state.late) == SCHEDULE.max_patches
    wide = dataclasses.replace(rules, schedule=dataclasses.replace(SCHEDULE, min_patches=5))
    state, _ = run(opened(), wide, None, *[(0.0, admitted(p)) for p in PATCHES])
    assert state.phase is Phase.SEALED
    assert len(rounds.reopen(state, 1.0).patches) == SCHEDULE.max_patches


def test_phases_that_have_ended_open_no_round_by_themselves() -> None:
    rules = rules_of(1, 1)
    for phase in (Phase.ADOPTED, Phase.REJECTED, Phase.ABANDONED):
        state = dataclasses.replace(opened(), phase=phase)
        assert rounds.advance(state, Tick(), 1e9, rules, rules.maintainers[0]) == (state, ())


events = st.one_of(
    st.sampled_from(PATCHES[:8]).map(admitted),
    st.lists(st.sampled_from(PATCHES[:8]), max_size=3).map(lambda p: PatchesRefused(tuple(p))),
    st.builds(
        CandidateSeen,
        st.sampled_from("abc").map(version),
        st.sampled_from(peers(4)),
        st.just((PATCHES[0],)),
        st.integers(1, 3),
    ),
    st.builds(
        verdict, st.sampled_from(peers(4)), st.sampled_from("abcxy").map(version), st.booleans(), st.integers(1, 3)
    ),
    st.builds(seen, st.sampled_from("xy"), st.sampled_from(peers(4)), st.integers(1, 3), st.just(True)),
    st.sampled_from("axy").map(lambda text: Decided(version(text))),
    st.just(Tick()),
)


@given(
    st.lists(st.tuples(st.floats(0, 40), events), max_size=40), st.integers(1, 3), st.sampled_from((None, *peers(3)))
)
def test_any_events_keep_the_promises_of_a_single_node(
    steps: list[tuple[float, Event]], threshold: int, me: PeerId | None
) -> None:
    rules = rules_of(3, threshold)
    state, now = opened(), 0.0
    adopted: list[Effect] = []
    examined: dict[int, set[VersionId]] = {}
    for pause, event in steps:
        now += pause
        before = state
        state, effects = rounds.advance(state, event, now, rules, me)
        adopted += [effect for effect in effects if isinstance(effect, Adopt)]
        for effect in effects:
            if isinstance(effect, Examine) and effect.version not in (version("x"), version("y")):
                examined.setdefault(state.round, set()).add(effect.version)
        assert state.round >= before.round
        assert state.patches == tuple(sorted(set(state.patches)))
        again, repeated = rounds.advance(state, event, now, rules, me)
        if not isinstance(event, Tick | PatchesRefused):
            assert (again, repeated) == (state, ())
        if state.phase in (Phase.REJECTED, Phase.ABANDONED):
            state = rounds.reopen(state, now)
    assert len(adopted) <= 1
    assert all(len(versions) == 1 for versions in examined.values())


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_all_nodes_end_a_round_with_the_same_version_in_whatever_order_messages_come(
    data: st.DataObject, count: int, chance: random.Random
) -> None:
    """Loss-free delivery, slow proposers, and as many maintainers that sign everything as the threshold bears."""
    threshold = data.draw(st.integers(count // 2 + 1, count))
    liars = set(peers(count)[: data.draw(st.integers(0, quorum.tolerated_liars(count, threshold)))])
    schedule = dataclasses.replace(SCHEDULE, verdict_seconds=1e9)
    rules = RoundRules(schedule, peers(count), threshold, MODEL)
    nodes: dict[PeerId | None, RoundState] = {me: opened() for me in (*rules.maintainers, None)}
    mail: list[tuple[PeerId | None, Event]] = [(me, admitted(p)) for me in nodes for p in PATCHES[:3]]
    candidates: set[VersionId] = set()
    adopted: dict[PeerId | None, list[VersionId]] = {me: [] for me in nodes}
    now = 0.0

    def announce(event: Event) -> None:
        mail.extend((to, event) for to in nodes)

    while mail:
        to, event = mail.pop(chance.randrange(len(mail)))
        now += chance.choice((0.0, 0.0, 3.0, 15.0))
        for input in (event, Tick()):
            nodes[to], effects = rounds.advance(nodes[to], input, now, rules, to)
            for effect in effects:
                if isinstance(effect, Propose) and to is not None:
                    made = version(f"by {to}")
                    candidates.add(made)
                    announce(CandidateSeen(made, to, effect.patches, effect.round))
                    for liar in liars:
                        announce(verdict(liar, made, chance.random() < 0.8))
                elif isinstance(effect, Examine) and to not in liars and to is not None:
                    announce(verdict(to, effect.version, chance.random() < 0.8))
                elif isinstance(effect, Adopt):
                    adopted[to].append(effect.version)
    assert candidates
    assert len({tuple(versions) for versions in adopted.values()}) == 1
    assert len(adopted[None]) <= 1


def simulate(seed: int, count: int, threshold: int, absent: int) -> Iterator[tuple[PeerId | None, VersionId]]:
    """Rounds in virtual time until each node has adopted: (node, version). Delays stay below half of proposer_seconds;
    exams can take too long, maintainers disagree, and the first `absent` say nothing."""
    chance = random.Random(seed)
    rules = rules_of(count, threshold)
    nodes: dict[PeerId | None, RoundState] = {me: opened() for me in (*rules.maintainers[absent:], None)}
    queue: list[tuple[float, int, PeerId | None, Event | Examine]] = []
    sent = 0

    def post(at: float, to: PeerId | None, what: Event | Examine) -> None:
        nonlocal sent
        sent += 1
        heapq.heappush(queue, (at, sent, to, what))

    def announce(now: float, event: Event) -> None:
        for to in nodes:
            post(now + chance.uniform(0, 3.9), to, event)

    def feed(now: float, to: PeerId | None) -> None:
        for number in range(3):
            post(now, to, admitted(PatchId(version(f"patch {number} of round {nodes[to].round}"))))

    for to in nodes:
        for second in range(120):
            post(float(second), to, Tick())
    for to in nodes:
        feed(0.0, to)
    left = len(nodes)
    while queue and left:
        now, _, to, what = heapq.heappop(queue)
        if isinstance(what, Examine):
            if to is not None and rounds.may_sign(nodes[to], what.version, now, rules):
                announce(now, verdict(to, what.version, chance.random() < 0.6, nodes[to].round))
            continue
        nodes[to], effects = rounds.advance(nodes[to], what, now, rules, to)
        for effect in effects:
            if isinstance(effect, Propose) and to is not None and chance.random() < 0.8:
                made = version(f"{to} {effect.round}")
                announce(now, CandidateSeen(made, to, effect.patches, effect.round))
            elif isinstance(effect, Examine):
                post(now + chance.choice((0.0, 12.0, 19.5, 25.0)), to, effect)
            elif isinstance(effect, Reject | Abandon):
                nodes[to] = rounds.reopen(nodes[to], now)
                feed(now, to)
            elif isinstance(effect, Adopt):
                left -= 1
                yield to, effect.version
            assert not isinstance(effect, Misbehaviour)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(1, 1, 0), (3, 2, 0), (3, 2, 1), (4, 3, 1), (5, 3, 2), (5, 4, 0), (2, 2, 0)]),
)
def test_failed_rounds_never_leave_a_parent_with_two_children(seed: int, swarm: tuple[int, int, int]) -> None:
    adopted = list(simulate(seed, *swarm))
    assert len({of for _, of in adopted}) <= 1
    assert len(adopted) in (0, swarm[0] - swarm[2] + 1)


def test_a_swarm_of_maintainers_gets_there() -> None:
    outcomes = [len(list(simulate(seed, 3, 2, 0))) for seed in range(20)]
    assert outcomes.count(4) >= 15


@pytest.mark.parametrize("phase", Phase)
def test_the_table_knows_only_events_that_the_phase_can_use(phase: Phase) -> None:
    known = {event for (at, event) in rounds.TRANSITIONS if at is phase}
    assert (known == set()) == (phase is Phase.ADOPTED)
    assert phase is Phase.ADOPTED or {CandidateSeen, VerdictSeen, PatchesAdmitted} <= known


def test_a_verdict_signed_at_the_last_moment_is_known_before_anybody_votes_again() -> None:
    rules = rules_of(3, 2)
    early, late = rules.maintainers[:2]
    slow, _ = voting(rules, late, at=4.0)
    assert rounds.may_sign(slow, version("a"), 23.9, rules)
    state, _ = voting(rules, early)
    state, effects = run(state, rules, early, (0.0, verdict(early, version("a"))), (27.0, Tick()))
    assert effects == []
    assert run(state, rules, early, (27.9, verdict(late, version("a"))))[1] == [Adopt(version("a"))]


def test_rules_come_from_the_manifest() -> None:
    key = Key.generate()
    noun = manifest(key)
    assert RoundRules.from_manifest(noun, Digest(MODEL)) == RoundRules(noun.schedule, (key.peer,), 1, MODEL)
