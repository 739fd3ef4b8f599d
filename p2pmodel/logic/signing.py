"""What a maintainer may sign: no two versions that could both be adopted.

Of merges it signs one a round, and none of a round before one that it signed in. On an aside (an amendment, a removal,
a rollback) people decide, and that takes as long as people take: it is signed in whatever round the node is, until
`verdict_seconds` after the node heard of it, and rejecting a merge does not stand in its way. Whoever has accepted an
aside accepts nothing else on the same parent until it is given up: `proposer_seconds` after that time, or when too many
have rejected it. So one that nobody else wants costs the others nothing.
"""

from p2pmodel.domain.ids import VersionId
from p2pmodel.logic.quorum import tally
from p2pmodel.logic.round_state import Phase, Proposal, RoundRules, RoundState


def may_sign(state: RoundState, version: VersionId, now: float, rules: RoundRules, *, accept: bool = False) -> bool:
    """Whether this maintainer may still sign the verdict on `version` that it was asked for: one that accepts it, or at
    least one that does not."""
    aside = next((c for c in state.candidates if c.version == version and c.aside), None)
    window = rules.schedule.verdict_seconds
    if aside is not None:
        there = state.phase in (Phase.OPEN, Phase.SEALED, Phase.VOTING) and now - aside.heard < window
        return there and not (accept and _is_bound(aside.round, version, state, now, rules))
    return (
        state.phase is Phase.VOTING
        and state.signed == version
        and state.signed_round < state.round
        and now - state.since < window
        and not (accept and _is_bound(state.round, version, state, now, rules))
    )


def _is_bound(round: int, version: VersionId, state: RoundState, now: float, rules: RoundRules) -> bool:
    """Whether it has accepted something that this could be adopted beside."""
    asides = {c.version: c for c in state.candidates if c.aside}
    for vote in state.accepted:
        if vote.version == version:
            continue
        in_the_round = vote.round == round
        under_vote = state.phase is Phase.VOTING and vote.round == state.round and vote.version not in asides
        if in_the_round or under_vote or (vote.version in asides and _lives(asides[vote.version], state, now, rules)):
            return True
    return False


def _lives(aside: Proposal, state: RoundState, now: float, rules: RoundRules) -> bool:
    """Whether it may still be adopted by verdicts signed in time."""
    against = len(tally(aside.version, aside.round, state.votes, rules.maintainers).rejects)
    over = aside.heard + rules.schedule.verdict_seconds + rules.schedule.proposer_seconds
    return now < over and against <= len(rules.maintainers) - rules.threshold
