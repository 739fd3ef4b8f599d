"""Rounds that lying maintainers try to stop, or to split: they can do neither as long as fewer lie than may. What
people decide on stands aside, and is not split either."""

import heapq
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.ids import PeerId, VersionId
from p2pmodel.logic import quorum, rounds
from p2pmodel.logic.admission import MAX_FAILED_ROUNDS
from p2pmodel.logic.rounds import (
    Abandon,
    Adopt,
    CandidateSeen,
    Decided,
    Event,
    Examine,
    Misbehaviour,
    PatchesAdmitted,
    Phase,
    Propose,
    Reject,
    RoundRules,
    RoundState,
    Tick,
)
from p2pmodel.logic.turns import FOLLOWED, next_round
from tests.unit.test_rounds import PATCHES, SCHEDULE, opened, ranked, rules_of, run, seen, verdict, version

DELAY = 0.39 * SCHEDULE.proposer_seconds
FAR = 1 + MAX_FAILED_ROUNDS
Node = PeerId | None


@dataclass
class Siege:
    """Honest maintainers and a watcher in virtual time, with liars among them. Whatever liars say reaches everybody, in
    any order; the honest find the honest's candidates good. decisive: what an honest maintainer proposes aside, that
    all honest people say yes to at some time, as long as it is on the head."""

    rules: RoundRules
    liars: tuple[PeerId, ...]
    chance: random.Random
    decisive: VersionId | None = None
    lies: int = 60
    nodes: dict[Node, RoundState] = field(default_factory=dict)
    adopted: dict[Node, VersionId] = field(default_factory=dict)
    at: dict[Node, float] = field(default_factory=dict)
    accused: set[PeerId] = field(default_factory=set)
    _queue: list[tuple[float, int, Node, Event | Examine]] = field(default_factory=list)
    _good: set[VersionId] = field(default_factory=set)
    _aside: set[VersionId] = field(default_factory=set)
    _rounds: dict[VersionId, int] = field(default_factory=dict)
    _sent: int = 0

    def run(self, seconds: int) -> None:
        chance, honest = self.chance, [p for p in self.rules.maintainers if p not in self.liars]
        self.nodes = {to: opened() for to in (*honest, None)}
        for to in self.nodes:
            for second in range(seconds):
                self._post(float(second), to, Tick())
            for patch in PATCHES[:3]:
                self._post(chance.uniform(0, DELAY) + 20.0 * bool(self.decisive), to, PatchesAdmitted((patch,)))
        for number in range(self.lies if self.liars else 0):
            self._lie(chance.uniform(0, seconds) if number % 3 else 0.0, number)
        if self.decisive:
            self._announce(1.0, self._seen(self.decisive, honest[0], 1, aside=True))
            for to in honest:
                for second in range(int(chance.uniform(1, 25)), 60):
                    self._post(float(second), to, Decided(self.decisive))
        while self._queue and len(self.adopted) < len(self.nodes):
            now, _, to, what = heapq.heappop(self._queue)
            self._happen(now, to, what)

    def _post(self, at: float, to: Node, what: Event | Examine) -> None:
        self._sent += 1
        heapq.heappush(self._queue, (at, self._sent, to, what))

    def _announce(self, now: float, event: Event) -> None:
        for to in self.nodes:
            self._post(now + self.chance.uniform(0, DELAY), to, event)

    def _seen(self, of: VersionId, proposer: PeerId, round: int, aside: bool = False) -> CandidateSeen:
        self._rounds[of] = round
        if aside:
            self._aside.add(of)
        return CandidateSeen(of, proposer, () if aside else (PATCHES[0],), round, aside=aside)

    def _lie(self, now: float, number: int) -> None:
        chance = self.chance
        liar, made = chance.choice(self.liars), version(f"lie {number}")
        round = chance.choice((1, 2, 3, 4, 5, 8, 13, FAR))
        self._announce(now, self._seen(made, liar, round, aside=chance.random() < 0.3))
        for voter in self.liars:
            at = now + chance.uniform(0, 5)
            self._announce(at, verdict(voter, made, True, round))
            honest = [v for v in self._rounds if v in self._good]
            if honest:
                of = chance.choice(honest)
                self._announce(at, verdict(voter, of, chance.random() < 0.5, self._rounds[of]))

    def _happen(self, now: float, to: Node, what: Event | Examine) -> None:
        chance, rules = self.chance, self.rules
        if isinstance(what, Examine):
            accept = what.version in self._good or what.version == self.decisive
            if to and rounds.may_sign(self.nodes[to], what.version, now, rules, accept=accept):
                own = verdict(to, what.version, accept, self._rounds[what.version])
                self._happen(now, to, own)
                self._announce(now, own)
            return
        self.nodes[to], effects = rounds.advance(self.nodes[to], what, now, rules, to)
        for effect in effects:
            if isinstance(effect, Propose) and to:
                made = version(f"{to} {effect.round}")
                self._good.add(made)
                self._announce(now + chance.uniform(1, 5), self._seen(made, to, effect.round))
            elif isinstance(effect, Examine):
                self._post(now + chance.uniform(1, 5), to, effect)
            elif isinstance(effect, Reject | Abandon):
                self.nodes[to] = rounds.reopen(self.nodes[to], now)
            elif isinstance(effect, Adopt):
                self.adopted[to], self.at[to] = effect.version, now
            elif isinstance(effect, Misbehaviour):
                self.accused.add(effect.maintainer)


def besieged(seed: int, count: int, threshold: int, liars: int, *, decide: bool = False, seconds: int = 900) -> Siege:
    rules = rules_of(count, threshold)
    aside = version("what people want") if decide else None
    siege = Siege(rules, rules.maintainers[count - liars :], random.Random(seed), aside)
    siege.run(seconds)
    return siege


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(4, 3, 1), (5, 4, 1), (5, 4, 2), (7, 5, 2), (3, 2, 0)]), st.booleans())
def test_liars_split_no_version(seed: int, swarm: tuple[int, int, int], decide: bool) -> None:
    count, threshold, liars = swarm
    siege = besieged(seed, count, threshold, liars, decide=decide, seconds=120)
    assert len(set(siege.adopted.values())) <= 1
    assert siege.accused <= set(siege.liars)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "threshold", "liars"), [(3, 2, 1), (4, 3, 1), (7, 5, 2)])
def test_liars_stop_no_round(seed: int, count: int, threshold: int, liars: int) -> None:
    siege = besieged(seed, count, threshold, liars)
    assert len(siege.adopted) == len(siege.nodes)
    assert max(siege.at.values()) < 600


def test_what_people_want_passes_while_rounds_fail() -> None:
    """Nobody has patches that are any good, and a liar spoils every round."""
    rules = rules_of(4, 3)
    liar, *honest = reversed(rules.maintainers)
    wanted = seen("wanted", honest[0], 1, aside=True)
    for decided in ((1.0, 9.0, 17.0), (17.0, 1.0, 1.0)):
        verdicts: list[tuple[float, Event]] = []
        for me, at in zip(honest, decided, strict=True):
            state, _ = run(opened(), rules, me, (0.0, wanted))
            for round in range(1, 9):
                made, now = version(f"garbage {round}"), float(round)
                against = [(now, verdict(p, made, False, round)) for p in honest]
                events: list[tuple[float, Event]] = [(now, CandidateSeen(made, liar, (PATCHES[0],), round)), *against]
                state, _ = run(state, rules, me, *events)
                assert state.phase is Phase.REJECTED
                state = rounds.reopen(state, now)
            state, effects = run(state, rules, me, (at, Decided(version("wanted"))))
            assert effects == [Examine(version("wanted"))]
            assert rounds.may_sign(state, version("wanted"), at, rules, accept=True)
            verdicts.append((at, verdict(me, version("wanted"), round=1)))
        assert run(opened(), rules, None, (0.0, wanted), *verdicts)[1][-1] == Adopt(version("wanted"))


def test_a_stream_of_amendments_takes_nobody_s_time() -> None:
    rules = rules_of(3, 2)
    first, liar, *_ = ranked(rules)
    stream = [(1.0, seen(f"amendment {n}", liar, 1 + n % 3, aside=True)) for n in range(100)]
    state, effects = run(opened(), rules, first, *stream, (99.0, Tick()))
    assert (state.phase, state.round, effects) == (Phase.OPEN, 1, [])
    assert len(state.candidates) == rounds.KEPT_EACH
    state, effects = run(state, rules, first, *[(99.0, PatchesAdmitted((patch,))) for patch in PATCHES[:2]])
    assert [type(effect) for effect in effects] == [Propose]
    state, effects = run(state, rules, first, *stream, (100.0, seen("good", first, 1)))
    assert effects == [Examine(version("good"))]
    assert rounds.may_sign(state, version("good"), 101.0, rules, accept=True)


def test_who_accepted_an_aside_accepts_nothing_beside_it_until_it_is_given_up() -> None:
    rules = rules_of(4, 3)
    me, *others = ranked(rules)
    aside = seen("wanted", me, 1, aside=True)
    said: list[tuple[float, Event]] = [
        (0.0, aside),
        (0.0, Decided(version("wanted"))),
        (0.0, verdict(me, version("wanted"))),
    ]
    state, effects = run(opened(), rules, me, *said, (1.0, seen("merge", me, 1)))
    assert effects == [Examine(version("wanted")), Examine(version("merge"))]
    assert rounds.may_sign(state, version("merge"), 2.0, rules)
    assert not rounds.may_sign(state, version("merge"), 2.0, rules, accept=True)
    later = version("later")
    for now, no, free in ((16.0, 0, False), (16.0, 2, True), (31.0, 0, True)):
        against = [(0.5, verdict(p, version("wanted"), accept=False)) for p in others[:no]]
        early, _ = run(opened(), rules, me, *said, *against)
        votes = [(now, verdict(p, later, accept=p == others[0], round=2)) for p in others[:2]]
        state, effects = run(early, rules, me, (now, seen("later", others[0], 2)), *votes)
        assert effects == [Examine(later)]
        assert rounds.may_sign(state, later, now, rules, accept=True) == free


def test_who_accepted_a_merge_accepts_no_aside_until_the_round_is_given_up() -> None:
    rules = rules_of(3, 2)
    me, other, _ = ranked(rules)
    state, _ = run(opened(), rules, me, (0.0, seen("a", me, 1)), (0.0, verdict(me, version("a"))))
    for round, able in ((1, False), (2, True)):
        aside = seen(f"aside of {round}", other, round, aside=True)
        word = Decided(aside.version)
        now, effects = run(state, rules, me, (20.0, aside), (20.0, word))
        assert effects == []
        now, effects = run(now, rules, me, (30.0, Tick()))
        assert [type(effect) for effect in effects] == [Abandon]
        again, effects = run(rounds.reopen(now, 30.0), rules, me, (31.0, word), (31.0, word))
        assert effects == ([Examine(aside.version)] if able else [])
        assert rounds.may_sign(again, aside.version, 39.9, rules, accept=True) == able
        assert not rounds.may_sign(again, aside.version, 40.0, rules)


def test_only_who_signed_for_two_versions_has_lied() -> None:
    rules = rules_of(3, 2)
    peer = rules.maintainers[0]
    both = [verdict(peer, version("a"), False), verdict(peer, version("b"))]
    assert run(opened(), rules, None, *[(0.0, event) for event in both])[1] == []
    assert quorum.double_signers([event.verdict for event in both]) == {}
    twice = [*both, verdict(peer, version("c"))]
    assert run(opened(), rules, None, *[(0.0, event) for event in twice])[1] == [
        Misbehaviour(peer, version("b"), version("c"))
    ]


@given(st.integers(0, 50), st.lists(st.one_of(st.integers(1, 90), st.integers(FAR, FAR + 99)), max_size=40))
def test_what_people_propose_is_of_a_round_that_can_be_reached(over: int, known: list[int]) -> None:
    round = next_round(over, known)
    assert over < round <= 90 + 1
    assert round not in known
    assert not any(round <= other <= round - 1 + FOLLOWED for other in known if other < round)


words = st.one_of(
    st.sampled_from("abcd").map(lambda text: Decided(version(text))),
    st.builds(
        seen, st.sampled_from("abcd"), st.sampled_from(rules_of(4, 3).maintainers), st.integers(1, 9), st.just(True)
    ),
    st.builds(seen, st.sampled_from("efgh"), st.sampled_from(rules_of(4, 3).maintainers), st.integers(1, 9)),
    st.builds(
        verdict,
        st.sampled_from(rules_of(4, 3).maintainers[1:]),
        st.sampled_from("abcdefgh").map(version),
        st.booleans(),
        st.integers(1, 9),
    ),
    st.sampled_from(PATCHES[:4]).map(lambda patch: PatchesAdmitted((patch,))),
    st.just(Tick()),
)


@given(st.lists(st.tuples(st.floats(0, 9), words), max_size=60))
def test_an_honest_maintainer_accepts_two_versions_only_when_one_is_given_up(steps: list[tuple[float, Event]]) -> None:
    """It accepts all that it is asked for, at once."""
    rules = rules_of(4, 3)
    me, state, now = rules.maintainers[0], opened(), 0.0
    accepted: list[tuple[float, int, bool, VersionId]] = []
    for pause, event in steps:
        now += pause
        pending: list[Event] = [event]
        while pending:
            state, effects = rounds.advance(state, pending.pop(), now, rules, me)
            for effect in effects:
                assert not (isinstance(effect, Misbehaviour) and effect.maintainer == me)
                if isinstance(effect, Examine) and rounds.may_sign(state, effect.version, now, rules, accept=True):
                    known = next(c for c in state.candidates if c.version == effect.version)
                    accepted.append((now, known.round, known.aside, known.version))
                    pending.append(verdict(me, known.version, round=known.round))
        if state.phase in (Phase.REJECTED, Phase.ABANDONED):
            state = rounds.reopen(state, now)
        if state.adopted:
            break
    assert len({round for _, round, _, _ in accepted}) == len(accepted)
