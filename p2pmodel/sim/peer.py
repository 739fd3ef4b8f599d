"""A peer: what it has heard of, what it holds, the round as it sees it, and its work.

What it decides is `logic/`'s: what to fetch and from whom, what to let in, which versions are proven, what becomes of
a round. Here is what a node does with these decisions, less disks, sockets and models.
"""

from collections import deque
from typing import TYPE_CHECKING

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import Digest, PatchId, PeerId, VersionId
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.version import BASE_NUMBER, Candidate, Verdict
from p2pmodel.logic import admission, propagation, round_state, rounds
from p2pmodel.logic.propagation import Backlog, Fetch
from p2pmodel.sim.book import Chain, Entry, bits

if TYPE_CHECKING:
    from p2pmodel.sim.simulation import Simulation

PARALLEL_FETCHES = 8
TICK_SECONDS = 0.5
EXAMINE_AGAIN_SECONDS = 10.0
"""As `node.rounds.roundkeeper` does when an examination fails."""


class Peer:
    """lives: how often it was started; since: from when on it is there, and connected, without a break."""

    __slots__ = (
        "_at_work",
        "_orphans",
        "_rules",
        "_sim",
        "_tick_at",
        "_wake_at",
        "_work",
        "asking",
        "backed",
        "backlog",
        "chain",
        "id",
        "lives",
        "maintains",
        "number",
        "offset",
        "rate",
        "seen",
        "since",
        "state",
        "stored",
        "trained_on",
        "trains",
    )

    def __init__(self, sim: "Simulation", number: int, id: PeerId, *, maintains: bool, trains: bool) -> None:
        self._sim, self.number, self.id = sim, number, id
        self.maintains, self.trains = maintains, trains
        self.rate, self.offset = sim.draw_clock()
        self.stored = self.seen = self.backed = self.lives = 0
        self.trained_on: set[VersionId] = set()
        self.since = 0.0
        self._rules = round_state.RoundRules.from_manifest(sim.book.manifest, sim.book.model)
        self._forget()

    def start(self) -> None:
        """With what it holds, and nothing else."""
        self.lives += 1
        self._forget()
        for entry in self._sim.book.of(self._sim.book.verdicts_by.get(self.id, 0) & self.stored):
            self._advance(round_state.VerdictSeen(entry.noun))  # type: ignore[arg-type]
        self._feed_all()

    def _forget(self) -> None:
        book = self._sim.book
        self.seen = self.stored
        self.backlog = Backlog()
        self.asking = self._at_work = False
        self._orphans: set[Digest] = set()
        self._work: deque[round_state.Propose | round_state.Examine] = deque()
        self._tick_at = self._wake_at = float("inf")
        self.chain: Chain = book.chain(self.backed)
        self.state: round_state.RoundState = rounds.start(self.chain.round + 1, self.chain.head, self.local)

    @property
    def local(self) -> float:
        """What its own clock shows."""
        return self._sim.clock.now * self.rate + self.offset

    # What it hears of, and fetches.

    def hear(self, number: int, holder: PeerId) -> None:
        if not self.seen >> number & 1:
            self._want(self._sim.book.entries[number], holder)
            self.begin()

    def hear_all(self, records: int, holder: PeerId) -> None:
        for entry in self._sim.book.of(records & ~self.seen):
            self._want(entry, holder)
        self.begin()

    def hear_of_nothing(self, digest: Digest, holder: PeerId) -> None:
        """Of a record that does not exist."""
        self.backlog = propagation.want(self.backlog, digest, "verdict", holder, 1, self._sim.clock.now)
        self.begin()

    def _want(self, entry: Entry, holder: PeerId) -> None:
        self.backlog = propagation.want(self.backlog, entry.digest, entry.kind, holder, entry.size, self._sim.clock.now)

    def begin(self) -> None:
        """Begins what is due, and sees to it that it is called again."""
        if not self.backlog.entries:
            return
        sim, now = self._sim, self._sim.clock.now
        sim.record.backlog = max(sim.record.backlog, len(self.backlog))
        wake = propagation.next_due(self.backlog)
        if wake is not None and wake <= now:
            self.backlog, fetches = propagation.due(self.backlog, now, PARALLEL_FETCHES)
            for fetch in fetches:
                sim.fetch(self, fetch, propagation.sources(self.backlog, fetch))
            wake = propagation.next_due(self.backlog)
        if wake is not None and now < wake < self._wake_at:
            self._wake_at = wake
            sim.clock.after(wake - now, self._wake, self.lives)

    def _wake(self, lives: int) -> None:
        if lives == self.lives:
            self._wake_at = float("inf")
            self.begin()

    def fetched(self, fetch: Fetch, entry: Entry) -> None:
        try:
            self._admit(entry)
        except Rejected as error:
            if error.reason == "parent":
                self._orphans.add(entry.digest)
                now = self._sim.clock.now
                self.backlog = propagation.failed(self.backlog, fetch.digest, fetch.holder, now)
            else:
                self.seen |= 1 << entry.number
                self.backlog = propagation.done(self.backlog, entry.digest)
                self._sim.record.refused += 1
        else:
            self.backlog = propagation.done(self.backlog, entry.digest)
            if entry.kind != "patch" and self._orphans:
                self.backlog = propagation.stir(self.backlog, self._orphans, self._sim.clock.now)
                self._orphans.clear()
            self.take_in(entry)
        self.begin()

    def not_fetched(self, fetch: Fetch, *, has_not: bool) -> None:
        """Nobody who said so has it; or else one of them has no time."""
        now = self._sim.clock.now
        self.backlog = propagation.failed(self.backlog, fetch.digest, fetch.holder, now, has_not=has_not)
        self._sim.wake_up(self)
        self.begin()

    # What it lets in.

    def _admit(self, entry: Entry) -> None:
        """Raises Rejected."""
        book, noun = self._sim.book, entry.noun
        if entry.forged:
            raise Rejected("signature", f"The signature of this {entry.kind} is not that of {entry.signer}.")
        if isinstance(noun, Patch):
            head = noun.parent if noun.parent in self.chain.parents else self.chain.head
            others = () if self.stored & book.naming.get(entry.digest, 0) else self._contributors(noun.parent)
            admission.check_patch(noun, book.manifest, head, self.chain.parents, model=book.model, contributors=others)
        elif isinstance(noun, Candidate):
            self._admit_candidate(noun, entry)
        else:
            on = self._candidate(noun.version)
            admission.check_verdict(noun, book.manifest, model=book.model, candidate=on)

    def _admit_candidate(self, candidate: Candidate, entry: Entry) -> None:
        book, number, round = self._sim.book, BASE_NUMBER, 0
        if candidate.parent != book.model:
            parent = self._candidate(candidate.parent)
            if parent is None:
                raise Rejected("parent", "The candidate's parent is not known here.")
            number, round = parent.number, parent.round
        admission.check_candidate(
            candidate,
            book.manifest,
            model=book.model,
            proposer=entry.signer,
            parent_number=number,
            parent_round=round,
            restorable=book.values if candidate.amends else (),
        )

    def _candidate(self, version: VersionId) -> Candidate | None:
        """When it holds it."""
        at = self._sim.book.candidates.get(version)
        if at is None or not self.stored >> at & 1:
            return None
        noun = self._sim.book.entries[at].noun
        assert isinstance(noun, Candidate)
        return noun

    def _contributors(self, parent: VersionId) -> list[PeerId]:
        book = self._sim.book
        return [book.entries[n].signer for n in bits(book.patches_on.get(parent, 0) & self.stored)]

    def take_in(self, entry: Entry) -> None:
        """It holds the record from now on, with all that belongs to it."""
        book, bit = self._sim.book, 1 << entry.number
        self.stored |= bit
        self.seen |= bit
        self._sim.stores(self, entry.number)
        noun = entry.noun
        if isinstance(noun, Patch):
            if noun.parent == self.chain.head:
                self._advance(round_state.PatchesAdmitted((entry.digest,)))
            return
        version = entry.version if isinstance(noun, Candidate) else noun.version
        if version in book.candidates:
            self.backed |= book.backed(self.stored, version)
            chain = book.chain(self.backed)
            if chain.head != self.chain.head:
                self._move_head(chain)
                return
        if isinstance(noun, Verdict):
            self._advance(round_state.VerdictSeen(noun))
        elif noun.parent == self.chain.head:
            self._see_candidate(entry, noun)

    # The round.

    def _move_head(self, chain: Chain) -> None:
        before, self.chain = self.chain, chain
        self._sim.moved_head(self, before.head)
        self.state = rounds.follow(self.state, chain.head, chain.round, self.local)
        self._feed_all()

    def _feed_all(self) -> None:
        book, chain = self._sim.book, self.chain
        for round in sorted(round for round in book.verdicts_in if round > chain.round):
            for entry in book.of(book.verdicts_in[round] & self.stored):
                self._advance(round_state.VerdictSeen(entry.noun))  # type: ignore[arg-type]
        for entry in book.of(book.candidates_on.get(chain.head, 0) & self.stored):
            if isinstance(entry.noun, Candidate):
                self._see_candidate(entry, entry.noun)
        waiting = book.of(book.patches_on.get(chain.head, 0) & self.stored)
        self._advance(round_state.PatchesAdmitted(tuple(entry.digest for entry in waiting)))
        self._set_tick()

    def _see_candidate(self, entry: Entry, candidate: Candidate) -> None:
        assert entry.version is not None
        patches = tuple(sorted({*candidate.patches, *(left.patch for left in candidate.left_out)}))
        seen = round_state.CandidateSeen(entry.version, entry.signer, patches, candidate.round, aside=candidate.amends)
        self._advance(seen)

    def _advance(self, event: round_state.Event) -> None:
        before = self.state
        me = self.id if self.maintains else None
        self.state, effects = rounds.advance(before, event, self.local, self._rules, me)
        for effect in effects:
            self._perform(effect)
        if self.state is not before:
            self._set_tick()

    def _perform(self, effect: round_state.Effect) -> None:
        record = self._sim.record
        match effect:
            case round_state.Propose() | round_state.Examine():
                self._work.append(effect)
                self._labour()
            case round_state.Reject() | round_state.Abandon():
                record.failed_rounds.setdefault((self.state.parent, effect.round), type(effect).__name__)
                self.state = rounds.reopen(self.state, self.local)
                self._feed_all()
            case round_state.Misbehaviour(maintainer):
                record.misbehaved.add(maintainer)

    def _set_tick(self) -> None:
        """The next look at the clock that can change something; a node looks every TICK_SECONDS."""
        at = rounds.next_tick(self.state, self._rules, self.id if self.maintains else None)
        if at is None:
            return
        now = self._sim.clock.now
        due = max(now, (at - self.offset) / self.rate) + TICK_SECONDS * self._sim.chance.random()
        if due < self._tick_at - TICK_SECONDS or self._tick_at < now:
            self._tick_at = due
            self._sim.clock.after(due - now, self._tick, self.lives, due)

    def _tick(self, lives: int, due: float) -> None:
        if lives == self.lives and due == self._tick_at:
            self._tick_at = float("inf")
            self._advance(round_state.Tick())
            self._set_tick()

    # A maintainer's work, one thing at a time.

    def _labour(self) -> None:
        if self._work and not self._at_work:
            self._at_work = True
            task = self._work.popleft()
            seconds = self._sim.seconds_of(task)
            self._sim.clock.after(seconds, self._done, self.lives, task)

    def _done(self, lives: int, task: round_state.Propose | round_state.Examine) -> None:
        if lives != self.lives:
            return
        self._at_work = False
        if isinstance(task, round_state.Propose):
            self._propose(task)
        elif self._sim.work_fails():
            self._sim.clock.after(EXAMINE_AGAIN_SECONDS, self._examine_again, self.lives, task)
        else:
            self._examine(task)
        self._labour()

    def _examine_again(self, lives: int, task: round_state.Examine) -> None:
        if lives == self.lives and rounds.may_sign(self.state, task.version, self.local, self._rules):
            self._work.append(task)
            self._labour()

    def _propose(self, task: round_state.Propose) -> None:
        sim, book = self._sim, self._sim.book
        if sim.work_fails():
            return self._advance(round_state.ProposalFailed())
        if task.parent != self.chain.head:
            return
        good = tuple(p for p in task.patches if book.entries[book.number_of[p]].good)
        bad = tuple(p for p in task.patches if p not in good)
        if not good:
            self._advance(round_state.PatchesRefused(task.patches))
        elif rounds.may_propose(self.state, task.round):
            self._publish_candidate(task.round, good, bad)

    def _publish_candidate(self, round: int, patches: tuple[PatchId, ...], left_out: tuple[PatchId, ...]) -> None:
        sim = self._sim
        sim.publish(self, sim.book.candidate(self.id, self.chain, round, patches, left_out))

    def _examine(self, task: round_state.Examine) -> None:
        sim, book = self._sim, self._sim.book
        entry = book.entries[book.candidates[task.version]]
        candidate = entry.noun
        assert isinstance(candidate, Candidate)
        missing = [p for p in candidate.patches if not self.stored >> book.number_of[p] & 1]
        if missing:
            sim.find(self, sum(1 << book.number_of[p] for p in missing))
            sim.clock.after(EXAMINE_AGAIN_SECONDS, self._examine_again, self.lives, task)
            return
        accept = entry.good and not sim.doubts()
        if rounds.may_sign(self.state, task.version, self.local, self._rules, accept=accept):
            sim.publish(self, book.verdict(self.id, task.version, candidate.round, accept))
