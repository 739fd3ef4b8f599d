"""Maintainers that lie: each is honest but for what the scenario says that it does."""

from typing import TYPE_CHECKING

from p2pmodel.domain.ids import PatchId, PeerId, VersionId
from p2pmodel.domain.version import Candidate
from p2pmodel.logic import round_state
from p2pmodel.logic.admission import MAX_FAILED_ROUNDS
from p2pmodel.sim.book import Chain, Entry, bits
from p2pmodel.sim.peer import Peer

if TYPE_CHECKING:
    from p2pmodel.sim.simulation import Simulation

SPOIL_AHEAD = 3
"""Rounds of the same parent for which a spoiler has its candidates out beforehand."""
LEAP_FROM = 2
"""A leaper doubles its leap each time, from here to what is admitted at all."""
AMEND_SECONDS = 60.0


class LyingMaintainer(Peer):
    """Of maintainers counted from the last, the first `liars.maintainers` sign every candidate that they hear of,
    whatever its round, and propose a bad one beside a good one; the first `spoilers`, `leapers`, `amenders` do what
    these names say. All reject what is honest, unless they sign everything."""

    __slots__ = ("_amends", "_leap", "_leaps", "_said", "_signs", "_spoiled", "_spoils")

    def __init__(self, sim: "Simulation", number: int, id: PeerId, place: int) -> None:
        """place: among the maintainers, 1 for the last."""
        lies = sim.scenario.liars
        self._signs, self._spoils = place <= lies.maintainers, place <= lies.spoilers
        self._leaps, self._amends = place <= lies.leapers, place <= lies.amenders
        self._spoiled = set[tuple[VersionId, int]]()
        self._leap, self._said = LEAP_FROM, 0
        super().__init__(sim, number, id, maintains=True, trains=False)

    def start(self) -> None:
        super().start()
        if self._leaps or self._amends:
            self._sim.clock.after(AMEND_SECONDS, self._stir, self.lives)
        self._spoil()

    def take_in(self, entry: Entry) -> None:
        super().take_in(entry)
        if self._signs and isinstance(entry.noun, Candidate) and entry.version is not None:
            self._sim.clock.after(1.0, self._sign_anything, self.lives, entry.version, entry.noun.round)
        self._spoil()

    def _sign_anything(self, lives: int, version: VersionId, round: int) -> None:
        if lives == self.lives:
            book = self._sim.book
            self._sim.publish(self, book.verdict(self.id, version, round, True))

    def _publish_candidate(self, round: int, patches: tuple[PatchId, ...], left_out: tuple[PatchId, ...]) -> None:
        if self._signs:
            super()._publish_candidate(round, patches, left_out)
            if left_out:
                super()._publish_candidate(round, tuple(sorted((*patches, *left_out))), ())

    def _examine(self, task: round_state.Examine) -> None:
        """Who signs everything has signed already."""
        if not self._signs:
            book = self._sim.book
            candidate = book.entries[book.candidates[task.version]]
            assert isinstance(candidate.noun, Candidate)
            accept = candidate.signer == self.id
            self._sim.publish(self, book.verdict(self.id, task.version, candidate.noun.round, accept))

    def _some_patch(self, chain: Chain) -> tuple[PatchId, ...]:
        """On the head, or else of its own making."""
        book = self._sim.book
        known = book.patches_on.get(chain.head, 0) & self.stored
        for number in bits(known):
            return (PatchId(book.entries[number].digest),)
        made = book.patch(
            self.id, chain.head, self._sim.scenario.work.patch_bytes, good=False, salt=str(self._sim.seed)
        )
        self._sim.publish(self, made)
        return (PatchId(made.digest),)

    def _spoil(self) -> None:
        """A candidate for the round that it is in and the next ones, before anybody's turn."""
        sim, chain = self._sim, self.chain
        if not self._spoils or sim.clock.now >= sim.stirs_until:
            return
        for round in range(self.state.round, self.state.round + SPOIL_AHEAD):
            if (chain.head, round) not in self._spoiled:
                self._spoiled.add((chain.head, round))
                sim.publish(self, sim.book.spoiled(self.id, chain, round, self._some_patch(chain)))

    def _stir(self, lives: int) -> None:
        sim, chain = self._sim, self.chain
        if lives != self.lives or sim.clock.now >= sim.stirs_until:
            return
        if self._leaps:
            ahead = min(self._leap, MAX_FAILED_ROUNDS)
            sim.publish(self, sim.book.spoiled(self.id, chain, chain.round + ahead, self._some_patch(chain)))
            self._leap = LEAP_FROM if ahead == MAX_FAILED_ROUNDS else 2 * self._leap
        if self._amends:
            self._said += 1
            made = sim.book.amending(self.id, chain, self.state.round, self._said)
            sim.publish(self, made)
            assert made.version is not None
            sim.publish(self, sim.book.verdict(self.id, made.version, self.state.round, True))
        sim.clock.after(AMEND_SECONDS, self._stir, lives)
