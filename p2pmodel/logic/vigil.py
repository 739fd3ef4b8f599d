"""Who is to blame for a silence, judged by what the hops of a route answer to pings.

A hop that misses two pings in a row is gone. One that computes is waited for: a long prompt takes its time. When all
answer, nobody computes and no byte of the session moves, then what was sent is lost, and the counts of frames tell
where: the first hop that has less than the one before it gave, or gave less than it took.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pmodel.domain.ids import PeerId

MISSES = 2
STILL_SECONDS = 1.5
"""A session whose bytes moved within this time is on its way."""
LOST_SECONDS = 3.0
"""For so long everything has to stand still before it counts as lost."""


@dataclass(frozen=True)
class Progress:
    """A session on one hop. taken, given: frames in and out; quiet: seconds since any byte of it moved there;
    back_taken, back_given: the same of gradients, which come from behind."""

    taken: int
    given: int
    quiet: float
    back_taken: int = 0
    back_given: int = 0


@dataclass(frozen=True)
class Sign:
    """What a peer says of itself. busy: age of the step that it computes, 0 if it does not; sessions: the session that
    was asked about, once for each hop that the peer is on its route, in order; none when it does not know it."""

    busy: float
    sessions: tuple[Progress, ...] = ()


@dataclass(frozen=True)
class Suspicion:
    """`what` follows the peer's name in a sentence."""

    peer: PeerId
    what: str


class Vigil:
    """Over one wait on a route: hears one round of signs after the other."""

    def __init__(self, hops: Sequence[PeerId], *, opening: bool = False) -> None:
        """opening: the session is only being opened, so that only pings count."""
        self._hops, self._opening = tuple(hops), opening
        self._misses = dict.fromkeys(hops, 0)
        self._still_since: float | None = None

    def hear(self, now: float, signs: Mapping[PeerId, Sign | None], sent: int, sent_back: int = 0) -> Suspicion | None:
        """signs: of every hop, None where it did not answer; sent: frames that the session's client has sent so far;
        sent_back: gradients, through the last hop."""
        for peer in self._hops:
            if signs[peer] is not None:
                self._misses[peer] = 0
        for peer in dict.fromkeys(self._hops):
            if signs[peer] is None:
                self._misses[peer] += 1
                if self._misses[peer] >= MISSES:
                    return Suspicion(peer, "does not answer any more")
        present = {peer: sign for peer, sign in signs.items() if sign is not None}
        if self._opening or len(present) < len(self._misses) or not all(map(_still, present.values())):
            self._still_since = None
        elif self._still_since is None:
            self._still_since = now
        elif now - self._still_since >= LOST_SECONDS:
            return self._loser(present, sent, sent_back)
        return None

    def _loser(self, signs: Mapping[PeerId, Sign], sent: int, sent_back: int) -> Suspicion:
        """The first hop at which the frames come to an end; the last one where all came through."""
        seen = dict.fromkeys(self._hops, 0)
        on_hops: list[tuple[PeerId, Progress]] = []
        for peer in self._hops:
            sessions, number = signs[peer].sessions, seen[peer]
            if number >= len(sessions):
                return Suspicion(peer, "does not know the session any more")
            on_hops.append((peer, sessions[number]))
            seen[peer] = number + 1
        there = [(peer, at.taken, at.given) for peer, at in on_hops]
        back = [(peer, at.back_taken, at.back_given) for peer, at in reversed(on_hops)]
        for hops, count in ((there, sent), (back, sent_back)):
            for peer, taken, given in hops:
                if taken < count:
                    return Suspicion(peer, "has not received what was sent to it")
                if given < taken:
                    return Suspicion(peer, "holds a step, and does not compute it")
                count = given
        last = self._hops[0] if sent_back else self._hops[-1]
        return Suspicion(last, "has lost its answer on the way")


def _still(sign: Sign) -> bool:
    return sign.busy == 0 and all(progress.quiet >= STILL_SECONDS for progress in sign.sessions)
