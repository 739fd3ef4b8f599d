"""One attempt after another to go from a version to the next, as one node sees it.

`TRANSITIONS` is the specification: what a phase does not know changes nothing. Whatever the order in which messages
arrive, a version is adopted when a threshold of maintainers accepted it: before the node sealed, after it gave the
round up, or with verdicts that came before the candidate. One state adopts once, and quorum.py says when all nodes
agree.

A round's number moves only when a candidate fails, so nodes that know the same candidates are in the same round. When
a candidate counts, one of a later round too, turns.py says; a node that votes ends its round first. All candidates and
verdicts on the same parent stay in the state from round to round, since a verdict can be late. Patches are tried
again in the next round unless candidates with them, by so many proposers that one is honest, were rejected: a
contributor has one patch on a parent, so to give up those of a round in which maintainers were silent, or its proposer
lied, could leave nothing to merge, ever.

A maintainer signs one merge a round (signing.py). It stops signing `verdict_seconds` after it heard of the candidate
and gives the round up `proposer_seconds` later, so that a verdict signed at the last moment is known before anybody
votes on another child of the same parent, whenever each began to vote. As long as candidates and verdicts take less
than half of `proposer_seconds` each, and no maintainer holds its verdict back, no parent gets two adopted children.
Beyond that `lineage.assemble` chooses between them.

Amendments, removals and rollbacks stand aside: no phase begins or ends by them, so that merges go on while people
think, and a stream of them takes no node's time. A maintainer's node examines one when its person has decided on it.

The node feeds the events, and at every new state feeds again what its store holds for it: its own verdicts first,
then the others', then the candidates and patches on `parent`. Feeding anything twice changes nothing.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from p2pmodel.domain.ids import PatchId, PeerId, VersionId
from p2pmodel.logic.quorum import Electorate, Vote, is_hopeless, tally
from p2pmodel.logic.round_state import (
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
    Proposal,
    ProposalFailed,
    Propose,
    Reject,
    RoundRules,
    RoundState,
    Tick,
    VerdictSeen,
)
from p2pmodel.logic.signing import may_sign
from p2pmodel.logic.turns import at_least_one_honest, counts_from, rank_of

__all__ = [
    "TRANSITIONS",
    "Abandon",
    "Adopt",
    "CandidateSeen",
    "Decided",
    "Effect",
    "Event",
    "Examine",
    "Misbehaviour",
    "PatchesAdmitted",
    "PatchesRefused",
    "Phase",
    "Proposal",
    "ProposalFailed",
    "Propose",
    "Reject",
    "RoundRules",
    "RoundState",
    "Tick",
    "VerdictSeen",
    "advance",
    "follow",
    "may_propose",
    "may_sign",
    "next_tick",
    "reopen",
    "start",
]

KEPT_EACH = 16
"""Candidates and votes kept of one maintainer on one parent, the latest rounds first: what bounds the state."""

Outcome = tuple[RoundState, tuple[Effect, ...]]


def start(round: int, parent: VersionId, now: float, signed_round: int = 0) -> RoundState:
    """The first state on `parent`; `round` is one more than that in which `parent` was adopted, 1 for the base;
    signed_round: the highest round that this node has ever signed a verdict in."""
    return RoundState(Phase.OPEN, round, parent, since=now, waiting=now, signed_round=signed_round)


def follow(state: RoundState, parent: VersionId, round: int, now: float) -> RoundState:
    """The state after the head moved to `parent`, which was adopted in `round`: by this state, or by proof."""
    votes, accepted = (tuple(v for v in each if v.round > round) for each in (state.votes, state.accepted))
    return replace(start(round + 1, parent, now, state.signed_round), votes=votes, accepted=accepted)


def reopen(state: RoundState, now: float) -> RoundState:
    """The next round on the same parent after a rejected or abandoned one, with the patches that are not settled."""
    patches = tuple(sorted(p for p in {*state.patches, *state.late} if p not in state.settled))
    return replace(
        state,
        phase=Phase.OPEN,
        round=state.round + 1,
        since=now,
        patches=patches,
        late=(),
        proposed=False,
        retry=None,
        signed=None,
        asked=(),
    )


def may_propose(state: RoundState, round: int) -> bool:
    """Whether a candidate that this node has made for `round` is still wanted."""
    return state.phase is Phase.SEALED and state.round == round


def next_tick(state: RoundState, rules: RoundRules, me: PeerId | None) -> float | None:
    """From when on a Tick changes something, if nothing else happens; None: never."""
    if state.phase is Phase.VOTING:
        return state.since + rules.schedule.verdict_seconds + rules.schedule.proposer_seconds
    if state.phase not in (Phase.OPEN, Phase.SEALED):
        return None
    due = _sealing(state, rules) if state.phase is Phase.OPEN else _turn(state, rules, me)
    times = [due, *(counts_from(candidate, state, rules, me) for candidate in state.candidates)]
    return min((at for at in times if at is not None), default=None)


def advance(state: RoundState, event: Event, now: float, rules: RoundRules, me: PeerId | None) -> Outcome:
    """What follows from `event` at `now` (seconds of a clock that never goes back) on the node of `me`; None, or a peer
    that is no maintainer, only watches."""
    handler = TRANSITIONS.get((state.phase, type(event)))
    return handler(state, event, _Here(now, rules, me)) if handler else (state, ())


@dataclass(frozen=True)
class _Here:
    now: float
    rules: RoundRules
    me: PeerId | None


def _admit(state: RoundState, event: PatchesAdmitted, here: _Here) -> Outcome:
    new = _new(state, event, here)
    return _seal(replace(state, patches=tuple(sorted((*state.patches, *new)))), here) if new else (state, ())


def _keep_for_next(state: RoundState, event: PatchesAdmitted, here: _Here) -> Outcome:
    return replace(state, late=(*state.late, *_new(state, event, here))), ()


def _new(state: RoundState, event: PatchesAdmitted, here: _Here) -> list[PatchId]:
    """As many of the event's as there is room for."""
    known = state.settled.union(state.patches, state.late)
    room = here.rules.schedule.max_patches - len(state.patches) - len(state.late)
    return [patch for patch in dict.fromkeys(event.patches) if patch not in known][: max(0, room)]


def _refuse(state: RoundState, event: PatchesRefused, here: _Here) -> Outcome:
    refused = state.settled.union(event.patches)
    left = tuple(sorted(p for p in {*state.patches, *state.late} if p not in refused))
    return _seal(
        replace(
            state,
            phase=Phase.OPEN,
            since=here.now,
            waiting=here.now,
            patches=left,
            late=(),
            settled=refused,
            proposed=False,
            retry=None,
        ),
        here,
    )


def _try_again(state: RoundState, event: ProposalFailed, here: _Here) -> Outcome:
    if here.me not in here.rules.maintainers:
        return state, ()
    return replace(state, proposed=False, retry=here.now + here.rules.schedule.proposer_seconds), ()


def _wait_for_patches(state: RoundState, event: Tick, here: _Here) -> Outcome:
    sealed, effects = _seal(state, here)
    return (sealed, effects) if sealed.phase is not Phase.OPEN else _decide(sealed, here)


def _sealing(state: RoundState, rules: RoundRules) -> float | None:
    """When the patches that are there are not waited with any more."""
    if not state.patches:
        return None
    schedule = rules.schedule
    return state.since if len(state.patches) >= schedule.min_patches else state.waiting + schedule.open_seconds


def _seal(state: RoundState, here: _Here) -> Outcome:
    at = _sealing(state, here.rules)
    if at is None or here.now < at:
        return state, ()
    # A round that this maintainer signed in on another parent is not to be signed again: it proposes in one after it.
    round = max(state.round, state.signed_round + 1)
    return _take_turn(replace(state, phase=Phase.SEALED, since=here.now, round=round), here)


def _wait_for_candidate(state: RoundState, event: Tick, here: _Here) -> Outcome:
    decided, effects = _decide(state, here)
    return (decided, effects) if decided.phase is not Phase.SEALED else _take_turn(decided, here)


def _turn(state: RoundState, rules: RoundRules, me: PeerId | None) -> float | None:
    """When this node is to propose."""
    rank = rank_of(me, state.round, rules)
    if rank is None or state.proposed:
        return None
    return state.since + rank * rules.schedule.proposer_seconds if state.retry is None else state.retry


def _take_turn(state: RoundState, here: _Here) -> Outcome:
    at = _turn(state, here.rules, here.me)
    if at is None or here.now < at:
        return state, ()
    return replace(state, proposed=True), (Propose(state.round, state.parent, state.patches),)


def _learn(state: RoundState, event: CandidateSeen, here: _Here) -> Outcome:
    # Whoever proposes what another has proposed must not take the other's turn from it.
    known = any((c.version, c.proposer) == (event.version, event.proposer) for c in state.candidates)
    if known or event.proposer not in here.rules.maintainers:
        return state, ()
    mine = [c for c in state.candidates if c.proposer == event.proposer]
    proposal = Proposal(
        event.version, event.round, event.proposer, event.patches, event.also, event.aside, heard=here.now
    )
    insort(mine, proposal, key=lambda c: c.round)
    others = [c for c in state.candidates if c.proposer != event.proposer]
    return _decide(replace(state, candidates=(*others, *mine[-KEPT_EACH:])), here)


def _ask(state: RoundState, event: Decided, here: _Here) -> Outcome:
    signed = any((v.maintainer, v.version) == (here.me, event.version) for v in state.votes)
    aside = any(c.aside and c.version == event.version for c in state.candidates)
    if not aside or signed or event.version in state.asked or here.me not in here.rules.maintainers:
        return state, ()
    if not may_sign(state, event.version, here.now, here.rules, accept=True):
        return state, ()
    return replace(state, asked=(*state.asked, event.version)), (Examine(event.version),)


def _count(state: RoundState, event: VerdictSeen, here: _Here) -> Outcome:
    vote = Vote.of(event.verdict)
    entitled = vote.maintainer in here.rules.maintainers or any(
        c.also and c.version == vote.version and vote.maintainer in c.also.maintainers for c in state.candidates
    )
    if not entitled or event.verdict.model != here.rules.model:
        return state, ()
    mine = [v for v in state.votes if v.maintainer == vote.maintainer]
    same = [v for v in mine if (v.round, v.version) == (vote.round, vote.version)]
    if any(v.accept or v == vote for v in same):
        return state, ()
    other = {v.version for v in mine if v.round == vote.round and v.version != vote.version and v.accept}
    mine = [v for v in mine if v not in same]
    insort(mine, vote, key=lambda v: v.round)
    others = [v for v in state.votes if v.maintainer != vote.maintainer]
    state = replace(state, votes=(*others, *mine[-KEPT_EACH:]))
    if vote.maintainer == here.me:
        state = _note_own(state, vote)
    decided, effects = _decide(state, here)
    if vote.accept and len(other) == 1:
        effects = (Misbehaviour(vote.maintainer, other.pop(), vote.version), *effects)
    return decided, effects


def _note_own(state: RoundState, vote: Vote) -> RoundState:
    if vote.accept:
        state = replace(state, accepted=(*state.accepted, vote))
    if vote.version in _asides(state):
        return state
    return replace(
        state,
        signed_round=max(state.signed_round, vote.round),
        signed=vote.version if vote.round == state.round else state.signed,
    )


def _asides(state: RoundState) -> set[VersionId]:
    return {candidate.version for candidate in state.candidates if candidate.aside}


def _on_merges(state: RoundState) -> list[Vote]:
    asides = _asides(state)
    return [vote for vote in state.votes if vote.version not in asides]


def _expire(state: RoundState, event: Tick, here: _Here) -> Outcome:
    schedule = here.rules.schedule
    if here.now - state.since < schedule.verdict_seconds + schedule.proposer_seconds:
        return _decide(state, here)
    heard = {vote.maintainer for vote in _on_merges(state) if vote.round == state.round}
    reason = f"{len(heard)} of {len(here.rules.maintainers)} maintainers gave a verdict in time"
    ended = replace(state, phase=Phase.ABANDONED, since=here.now, settled=_settled(state, here.rules))
    return ended, (Abandon(state.round, reason),)


def _decide(state: RoundState, here: _Here) -> Outcome:
    """What the known candidates and votes amount to."""
    rules = here.rules
    for candidate in sorted(state.candidates, key=lambda c: (c.round, c.version)):
        if _is_accepted(candidate, state, rules):
            return replace(state, phase=Phase.ADOPTED, since=here.now, adopted=candidate), (Adopt(candidate.version),)
    if state.phase in (Phase.OPEN, Phase.SEALED):
        first = _first_that_counts(state, here)
        if first is None:
            return state, ()
        mine = (v for v in _on_merges(state) if v.maintainer == here.me and v.round == first.round)
        signed = next((vote.version for vote in mine), None)
        state = replace(state, phase=Phase.VOTING, round=first.round, since=first.heard, signed=signed)
        return _vote(state, here, first)
    return _vote(state, here) if state.phase is Phase.VOTING else (state, ())


def _first_that_counts(state: RoundState, here: _Here) -> Proposal | None:
    """Of those whose turn has come: of the highest round, one that can still be signed, of the first proposer."""
    rules = here.rules
    there = [(c, counts_from(c, state, rules, here.me)) for c in state.candidates]
    counting = [c for c, at in there if at is not None and at <= here.now]

    def place(candidate: Proposal) -> tuple[int, bool, int, VersionId]:
        over = here.now - candidate.heard >= rules.schedule.verdict_seconds
        rank = rank_of(candidate.proposer, candidate.round, rules) or 0
        return (-candidate.round, over, rank, candidate.version)

    return min(counting, key=place, default=None)


def _is_accepted(candidate: Proposal, state: RoundState, rules: RoundRules) -> bool:
    wanted = [Electorate(rules.maintainers, rules.threshold), *([candidate.also] if candidate.also else [])]
    return all(
        each.adopts(tally(candidate.version, candidate.round, state.votes, each.maintainers).accepts) for each in wanted
    )


def _vote(state: RoundState, here: _Here, first: Proposal | None = None) -> Outcome:
    """first: to be examined, when the vote begins."""
    rules = here.rules
    if is_hopeless(state.round, _on_merges(state), rules.maintainers, rules.threshold):
        rejected = replace(state, phase=Phase.REJECTED, since=here.now, settled=_settled(state, rules))
        return rejected, (Reject(state.round, f"no candidate can get {rules.threshold} accepting verdicts any more"),)
    late = here.now - state.since >= rules.schedule.verdict_seconds
    if first is None or late or here.me not in rules.maintainers or state.signed or state.signed_round >= state.round:
        return state, ()
    return replace(state, signed=first.version), (Examine(first.version),)


def _settled(state: RoundState, rules: RoundRules) -> frozenset[PatchId]:
    """With the patches of candidates that so many maintainers have rejected that they can't be adopted, made by so many
    proposers that one of them is honest: a lying one could spoil any patch. Where maintainers were silent, or divided,
    patches are tried again."""
    maintainers = len(rules.maintainers)
    enough = min(maintainers, at_least_one_honest(rules))
    spoiled: dict[PatchId, set[PeerId]] = {}
    for candidate in state.candidates:
        if _rejects(candidate, state, rules) > maintainers - rules.threshold:
            for patch in candidate.patches:
                spoiled.setdefault(patch, set()).add(candidate.proposer)
    return state.settled.union(patch for patch, by in spoiled.items() if len(by) >= enough)


def _rejects(candidate: Proposal, state: RoundState, rules: RoundRules) -> int:
    return len(tally(candidate.version, candidate.round, state.votes, rules.maintainers).rejects)


TRANSITIONS: dict[tuple[Phase, type], Callable[[RoundState, Any, _Here], Outcome]] = {
    (Phase.OPEN, PatchesAdmitted): _admit,
    (Phase.OPEN, CandidateSeen): _learn,
    (Phase.OPEN, Decided): _ask,
    (Phase.OPEN, VerdictSeen): _count,
    (Phase.OPEN, Tick): _wait_for_patches,
    (Phase.SEALED, PatchesAdmitted): _keep_for_next,
    (Phase.SEALED, PatchesRefused): _refuse,
    (Phase.SEALED, ProposalFailed): _try_again,
    (Phase.SEALED, CandidateSeen): _learn,
    (Phase.SEALED, Decided): _ask,
    (Phase.SEALED, VerdictSeen): _count,
    (Phase.SEALED, Tick): _wait_for_candidate,
    (Phase.VOTING, PatchesAdmitted): _keep_for_next,
    (Phase.VOTING, CandidateSeen): _learn,
    (Phase.VOTING, Decided): _ask,
    (Phase.VOTING, VerdictSeen): _count,
    (Phase.VOTING, Tick): _expire,
    # A verdict can come after the round was given up here, and still make the threshold.
    (Phase.REJECTED, PatchesAdmitted): _keep_for_next,
    (Phase.REJECTED, CandidateSeen): _learn,
    (Phase.REJECTED, VerdictSeen): _count,
    (Phase.ABANDONED, PatchesAdmitted): _keep_for_next,
    (Phase.ABANDONED, CandidateSeen): _learn,
    (Phase.ABANDONED, VerdictSeen): _count,
}
