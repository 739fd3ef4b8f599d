"""Who may propose, and what the maintainers' verdicts amount to.

Two versions of one round can both reach the threshold t of n maintainers only if 2t - n of them sign twice. So with f
maintainers that do, one round adopts at most one version as long as **t > (n + f) / 2**, and t maintainers have to be
there for any. A Manifest may set t lower, down to 1: then two maintainers can fork the lineage without either lying.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.domain.version import Verdict


@dataclass(frozen=True)
class Vote:
    """What counts of a verdict."""

    maintainer: PeerId
    round: int
    version: VersionId
    accept: bool

    @classmethod
    def of(cls, verdict: Verdict) -> "Vote":
        return cls(verdict.maintainer, verdict.round, verdict.version, verdict.accept)


@dataclass(frozen=True)
class Tally:
    """The maintainers, sorted, by what they said of one version: each is in exactly one of the four.

    elsewhere: signed another version of the same round, and not this one; silent: nothing heard.
    """

    accepts: tuple[PeerId, ...]
    rejects: tuple[PeerId, ...]
    elsewhere: tuple[PeerId, ...]
    silent: tuple[PeerId, ...]


def proposers(model: ModelId, round: int, maintainers: Collection[PeerId]) -> tuple[PeerId, ...]:
    """The maintainers in the order in which they may propose: rendezvous hashing, so that all agree without a word,
    and the order changes from round to round. https://en.wikipedia.org/wiki/Rendezvous_hashing"""
    return tuple(sorted(maintainers, key=lambda peer: hashlib.sha256(f"{model}/{round}/{peer}".encode()).digest()))


def tally(version: VersionId, round: int, votes: Iterable[Vote | Verdict], maintainers: Collection[PeerId]) -> Tally:
    """What `votes` say of `version`, proposed in `round`. Votes of strangers and of other rounds count for nothing.

    A maintainer that signed two versions counts for both, and one that accepted and rejected the same counts as
    accepting. To void its signatures would make the outcome depend on who hears of what first: a node that had
    counted them would have adopted, one that heard both at once would not, and no later message would reconcile the
    two. Counted, the outcome is a function of the set of verdicts alone.
    """
    accepts: set[PeerId] = set()
    rejects: set[PeerId] = set()
    elsewhere: set[PeerId] = set()
    for vote in votes:
        if vote.round == round:
            group = elsewhere if vote.version != version else accepts if vote.accept else rejects
            group.add(vote.maintainer)
    everyone = set(maintainers)
    rejects -= accepts
    elsewhere -= accepts | rejects
    silent = everyone - accepts - rejects - elsewhere
    return Tally(*(tuple(sorted(group & everyone)) for group in (accepts, rejects, elsewhere, silent)))


def is_hopeless(round: int, votes: Collection[Vote | Verdict], maintainers: Collection[PeerId], threshold: int) -> bool:
    """Whether no version of `round`, known or not, can reach the threshold any more, if nobody signs twice."""
    heard = {vote.maintainer for vote in votes if vote.round == round} & set(maintainers)
    versions = {vote.version for vote in votes if vote.round == round}
    best = max((len(tally(version, round, votes, maintainers).accepts) for version in versions), default=0)
    return best + len(maintainers) - len(heard) < threshold


def tolerated_liars(maintainers: int, threshold: int) -> int:
    """How many maintainers may sign twice without one round adopting two versions; negative when none has to."""
    return 2 * threshold - maintainers - 1
