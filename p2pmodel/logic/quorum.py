"""Who may propose, and what the maintainers' verdicts amount to.

Two versions of one round can both reach the threshold t of n maintainers only if 2t - n of them accept both. So with f
maintainers that do, one round adopts at most one version as long as **t > (n + f) / 2**, and t maintainers have to be
there for any. A Manifest may set t lower, down to 1: then two maintainers can fork the lineage without either lying.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.domain.model import Manifest
from p2pmodel.domain.version import Candidate, Verdict


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


@dataclass(frozen=True)
class Electorate:
    """Some peers, and how many of them have to accept."""

    maintainers: tuple[PeerId, ...]
    threshold: int

    def adopts(self, accepts: Collection[PeerId]) -> bool:
        return len(set(accepts) & set(self.maintainers)) >= self.threshold


def electorates(manifest: Manifest, candidate: Candidate) -> tuple[Electorate, ...]:
    """Who has to accept a candidate, each of them at its threshold. manifest: in force at the candidate's parent.

    The maintainers there; and those who are to decide from now on, when an amendment says that it is others, or another
    number of them: so nobody is made a maintainer who does not hold the key, and no threshold is set that those who are
    there can't reach. It is how TUF rotates its root (https://theupdateframework.github.io/specification/, 5.3)."""
    old = Electorate(manifest.maintainers, manifest.threshold)
    if candidate.amendment is None:
        return (old,)
    new = Electorate(candidate.amendment.maintainers, candidate.amendment.threshold)
    return (old,) if new == old else (old, new)


def double_signers(verdicts: Iterable[Verdict]) -> dict[tuple[PeerId, int], tuple[VersionId, ...]]:
    """(maintainer, round) -> the versions that it accepted in that round, where it is more than one: the proof of its
    misbehaviour. Sorted. Who rejects one and accepts another adds to no second version."""
    signed: dict[tuple[PeerId, int], set[VersionId]] = {}
    for verdict in verdicts:
        if verdict.accept:
            signed.setdefault((verdict.maintainer, verdict.round), set()).add(verdict.version)
    return {who: tuple(sorted(versions)) for who, versions in sorted(signed.items()) if len(versions) > 1}


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
    """How many maintainers may accept twice without one round adopting two versions; negative when none has to."""
    return 2 * threshold - maintainers - 1
