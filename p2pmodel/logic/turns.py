"""When a candidate counts: from when on a node that waits in an earlier phase, or an earlier round, votes on it.

One maintainer that lies must not be able to end every round, so a candidate counts only in its proposer's turn: that of
rank k from k times `proposer_seconds` after the node sealed the round, whenever it came. A node that has not sealed,
since it lacks patches, waits as long from when it heard of the candidate. A candidate of a later round counts when all
of this round's proposers have had their turns and were silent, and only a few rounds ahead, so that nobody uses up the
numbers; each failed round leaves candidates, so a late node climbs from one to the next. What so many others have
signed that one of them is honest counts at once, however far ahead it is.
"""

from collections.abc import Iterable

from p2pmodel.domain.ids import PeerId
from p2pmodel.logic.quorum import proposers, tolerated_liars
from p2pmodel.logic.round_state import Phase, Proposal, RoundRules, RoundState

FOLLOWED = 4
"""How many rounds ahead a candidate may be that is followed without the word of others."""


def rank_of(peer: PeerId | None, round: int, rules: RoundRules) -> int | None:
    """Its place in the order in which the round's proposers have their turns; None for who is no maintainer."""
    return proposers(rules.model, round, rules.maintainers).index(peer) if peer in rules.maintainers else None


def counts_from(candidate: Proposal, state: RoundState, rules: RoundRules, me: PeerId | None) -> float | None:
    """In OPEN and SEALED: the time from which on the state votes on it; None: never, as things are."""
    ahead = candidate.round - state.round
    if candidate.aside or ahead < 0:
        return None
    if _is_vouched_for(candidate, state, rules, me):
        return candidate.heard
    if ahead > FOLLOWED:
        return None
    turns = rank_of(candidate.proposer, state.round, rules) if ahead == 0 else len(rules.maintainers)
    if turns is None:
        return None
    begin = state.since if state.phase is Phase.SEALED else max(state.since, candidate.heard)
    return begin + turns * rules.schedule.proposer_seconds


def next_round(over: int, known: Iterable[int]) -> int:
    """For what people propose: a round that comes after `over`, and after those of known candidates that nodes would
    climb by."""
    for round in sorted(known):
        if over < round <= over + FOLLOWED:
            over = round
    return over + 1


def at_least_one_honest(rules: RoundRules) -> int:
    """So many maintainers do not all lie, if fewer do than may."""
    return max(1, tolerated_liars(len(rules.maintainers), rules.threshold)) + 1


def _is_vouched_for(candidate: Proposal, state: RoundState, rules: RoundRules, me: PeerId | None) -> bool:
    others = set(rules.maintainers) - {me}
    heard = {v.maintainer for v in state.votes if (v.round, v.version) == (candidate.round, candidate.version)}
    return len(heard & others) >= min(at_least_one_honest(rules), len(others))
