"""Feeds what happens into the round's transition table, and does what comes out.

What decides is `p2pmodel.logic.rounds`; that a version is adopted is proven by the lineage's records alone.
Propositions and examinations block, so they run on a thread, one at a time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from p2pmodel.domain.errors import P2PModelError, Unreachable
from p2pmodel.domain.ids import Digest, PatchId, PeerId, VersionId, short
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.version import Candidate, Verdict
from p2pmodel.logic import round_state, rounds
from p2pmodel.logic.quorum import electorates
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.telemetry.metrics import Metrics
from p2pmodel.wire.signing import Key

if TYPE_CHECKING:  # it loads transformers, which a node that only watches can do without
    from p2pmodel.node.rounds.maintaining import Maintainer

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
AGAIN_SECONDS = 10.0
"""After an examination or a signature that failed, as long as its verdict is still wanted."""

Announce = Callable[[str, BlobRef], Awaitable[None]]
Adopted = Callable[[VersionId], Awaitable[None]]
FindPatches = Callable[[Collection[PatchId], Collection[PeerId]], Awaitable[None]]


class RoundKeeper:
    def __init__(
        self,
        lineage: Lineage,
        key: Key,
        maintainer: "Maintainer | None",
        announce: Announce,
        adopted: Adopted,
        find_patches: FindPatches,
        metrics: Metrics,
        ask: bool = False,
    ) -> None:
        """maintainer: None for a node that only watches. find_patches: asks peers for patches that are not
        here, first those that are named. ask: whether a person decides on what the exam accepts; on amendments people
        always decide."""
        self._ask, self._asked = ask, dict[VersionId, Verdict]()
        self._sign_again = dict[VersionId, float]()
        self._lacking = set[VersionId]()
        self._named = set[PeerId]()
        self._signing = asyncio.Lock()
        self._lineage, self._key, self._maintainer, self._metrics = lineage, key, maintainer, metrics
        self._announce, self._adopted, self._find_patches = announce, adopted, find_patches
        self._rules = round_state.RoundRules.from_manifest(lineage.manifest, lineage.model)
        self._me = key.peer if maintainer else None
        self._head = lineage.head
        self._work: asyncio.Queue[round_state.Propose | round_state.Examine] = asyncio.Queue()
        self.state = self._first_state()

    async def run(self) -> None:
        """Until cancelled."""
        self._feed_all()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            if self._maintainer:
                tasks.create_task(self._labour())

    async def on_record(self, kind: str, digest: Digest) -> None:
        """A record has come into the lineage, whoever made it."""
        lineage = self._lineage
        if lineage.head != self._head:
            await self._move_head()
        elif kind == "patch" and lineage.patches[digest].parent == self._head:
            self._advance(round_state.PatchesAdmitted((digest,)))
        elif kind == "candidate":
            self._see_candidates()
        elif kind == "verdict":
            self._advance(round_state.VerdictSeen(lineage.verdicts[digest]))

    @property
    def examined(self) -> int:
        """How many of the round's patches this node has examined, to propose what they make."""
        return self._maintainer.examined if self._maintainer and self.state.proposed else 0

    def _first_state(self) -> round_state.RoundState:
        lineage = self._lineage
        last = lineage.versions[-1].candidate.round if lineage.versions else 0
        return rounds.start(last + 1, lineage.head, time.monotonic())

    def _feed_all(self) -> None:
        """Own verdicts first, so that nothing is signed twice; feeding anything again changes nothing. What was signed
        in rounds up to the head's decides nothing any more, and who lied there was named then."""
        lineage = self._lineage
        last = lineage.versions[-1].candidate.round if lineage.versions else 0
        verdicts = [verdict for verdict in lineage.verdicts.values() if verdict.round > last]
        self._see_candidates(asides_alone=True)  # a verdict on one is no vote in the round, which the table has to know
        for verdict in sorted(verdicts, key=lambda v: v.maintainer != self._key.peer):
            self._advance(round_state.VerdictSeen(verdict))
        self._see_candidates()
        # At once, so that the round takes as many of them as it may, and not the first that seal it.
        waiting = (patch for patch, header in lineage.patches.items() if header.parent == self._head)
        self._advance(round_state.PatchesAdmitted(tuple(waiting)))

    def _see_candidates(self, *, asides_alone: bool = False) -> None:
        for version, candidate in self._lineage.candidates.items():
            if candidate.parent == self._head and (candidate.aside or not asides_alone):
                patches = tuple(sorted({*candidate.patches, *(x.patch for x in candidate.left_out)}))
                wanted = electorates(self._lineage.manifest, candidate)
                also = wanted[1] if len(wanted) > 1 else None
                for proposer in self._lineage.proposers[version]:
                    self._advance(
                        round_state.CandidateSeen(version, proposer, patches, candidate.round, also, candidate.aside)
                    )
                for verdict in self._lineage.verdicts.values() if also else ():
                    if verdict.version == version:
                        self._advance(round_state.VerdictSeen(verdict))

    async def _move_head(self) -> None:
        head, last = self._lineage.head, self._lineage.versions[-1].candidate.round
        before, self._head = self._head, head
        log.info("version %s (%s) is adopted in round %d", self._lineage.number(head), short(head), last)
        self._count_adopted(before)
        try:
            await self._adopted(head)
        except P2PModelError as error:
            # Whatever this node serves, the round on the old head is over.
            log.error("version %s is adopted; this node has not done all that this takes: %s", short(head), error)
        if self._head != head:
            return  # a newer one came meanwhile
        self._rules = round_state.RoundRules.from_manifest(self._lineage.manifest, self._lineage.model)
        self._asked.clear()
        self._sign_again.clear()
        self._lacking.clear()
        self._named.clear()
        self.state = rounds.follow(self.state, self._head, last, time.monotonic())
        self._feed_all()

    def _count_adopted(self, before: VersionId) -> None:
        """The versions that came since `before`, and what became of their patches."""
        versions = [version.id for version in self._lineage.versions]
        for version in self._lineage.versions[versions.index(before) + 1 if before in versions else 0 :]:
            self._metrics.rounds.labels("adopted").inc()
            self._metrics.patches.labels("merged").inc(len(version.candidate.patches))
            self._metrics.patches.labels("left_out").inc(len(version.candidate.left_out))

    def _advance(self, event: round_state.Event) -> None:
        if self.state.parent != self._head:
            return  # the node is taking a new head; then all is fed again
        self.state, effects = rounds.advance(self.state, event, time.monotonic(), self._rules, self._me)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: rounds.Effect) -> None:
        match effect:
            case round_state.Propose() | round_state.Examine():
                if self._maintainer and isinstance(effect, round_state.Propose):
                    self._maintainer.examined = 0
                self._work.put_nowait(effect)
            case round_state.Adopt(version):
                log.debug("enough maintainers accept %s", short(version))
            case round_state.Reject(round, reason) | round_state.Abandon(round, reason):
                outcome = "rejected" if isinstance(effect, round_state.Reject) else "abandoned"
                log.warning("round %d is %s: %s", round, outcome, reason)
                self._metrics.rounds.labels(outcome).inc()
                self.state = rounds.reopen(self.state, time.monotonic())
                self._feed_all()
            case round_state.Misbehaviour(maintainer, one, other):
                log.error(
                    "maintainer %s signed two versions in one round: %s and %s", maintainer, short(one), short(other)
                )
                self._metrics.rounds.labels("misbehaviour").inc()

    async def _tick(self) -> None:
        while True:
            self._advance(round_state.Tick())
            try:
                self._hear_of_asides()
            except P2PModelError as error:
                log.error("what people have decided cannot be read: %s", error)
            for version in list(self._asked):
                if self._sign_again.get(version, 0.0) <= time.monotonic():
                    await self._try_to_hear_decision(version)
            await asyncio.sleep(TICK_SECONDS)

    def _hear_of_asides(self) -> None:
        """What people alone decide on is examined when they have."""
        for known in self.state.candidates if self._me else ():
            if not known.aside:
                continue
            candidate = self._lineage.candidates[known.version]
            if self._lineage.notes.decision(known.version) or self._lineage.agrees_to(candidate):
                self._advance(round_state.Decided(known.version))
            elif known.proposer not in self._named:
                self._named.add(known.proposer)
                log.warning("version %s waits for your word: p2pmodel round approve %s", *[short(known.version)] * 2)

    async def _try_to_hear_decision(self, version: VersionId) -> None:
        try:
            await self._hear_decision(version)
        except P2PModelError as error:
            log.error("the verdict on version %s cannot be given yet: %s", short(version), error)
            self._sign_again[version] = time.monotonic() + AGAIN_SECONDS

    async def _labour(self) -> None:
        while True:
            task = await self._work.get()
            try:
                await (self._propose(task) if isinstance(task, round_state.Propose) else self._examine(task))
            except P2PModelError as error:
                if isinstance(task, round_state.Propose) and not self._wants(task):
                    log.info("round %d: the work on a candidate is given up: %s", task.round, error)
                    continue
                log.error("the round's work failed: %s", error)
                if isinstance(task, round_state.Propose):
                    self._advance(round_state.ProposalFailed())
                else:
                    asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._examine_again, task)

    def _examine_again(self, task: round_state.Examine) -> None:
        if rounds.may_sign(self.state, task.version, time.monotonic(), self._rules):
            self._work.put_nowait(task)

    def _wants(self, task: round_state.Propose) -> bool:
        """Whether a candidate for the task still has a place. May be asked on any thread."""
        state = self.state
        return state.parent == task.parent and rounds.may_propose(state, task.round)

    async def _propose(self, task: round_state.Propose) -> None:
        assert self._maintainer
        if not self._wants(task):
            return  # others' work came before it, and meanwhile somebody else has proposed
        log.info("round %d: examining %d patches", task.round, len(task.patches))
        proposal = await asyncio.to_thread(
            self._maintainer.propose, task.round, task.parent, task.patches, lambda: self._wants(task)
        )
        if not self._wants(task):
            return
        if proposal is None:
            log.warning("round %d: none of the patches can be merged", task.round)
            self._advance(round_state.PatchesRefused(task.patches))
        else:
            for raw in proposal.blobs:
                self._lineage.home.objects.put(raw)
            await self._publish("candidate", self._key.sign("candidate", proposal.candidate))

    async def _examine(self, task: round_state.Examine) -> None:
        assert self._maintainer
        if not rounds.may_sign(self.state, task.version, time.monotonic(), self._rules):
            return
        candidate = self._lineage.candidates[task.version]
        missing = self._missing(candidate)
        if missing:
            await self._find_patches(missing, self._lineage.proposers[task.version])
            missing = self._missing(candidate)
        if missing:
            if task.version not in self._lacking:
                self._lacking.add(task.version)
                self._metrics.refused.labels("candidate", "patches").inc()
            raise Unreachable(
                f"{len(missing)} of the patches of version {short(task.version)} cannot be had, so it cannot be judged."
            )
        verdict = await asyncio.to_thread(self._maintainer.examine, task.version)
        if verdict.accept and (candidate.amends or candidate.removes or (self._ask and not candidate.restores)):
            self._asked[task.version] = verdict
            self._lineage.notes.note_scores(task.version, verdict.scores)
            log.warning("version %s waits for your word: p2pmodel round approve %s", *[short(task.version)] * 2)
            await self._hear_decision(task.version)
        else:
            await self._sign(verdict)

    def _missing(self, candidate: Candidate) -> list[PatchId]:
        return [patch for patch in candidate.patches if patch not in self._lineage.patches]

    async def _hear_decision(self, version: VersionId) -> None:
        decision = self._lineage.notes.decision(version)
        if decision is not None and version in self._asked:
            accept, reason = decision
            await self._sign(replace(self._asked[version], accept=accept, reason=reason))
            self._asked.pop(version, None)  # what was signed may have moved the head, and nothing is asked of it then

    async def _sign(self, verdict: Verdict) -> None:
        async with self._signing:  # what one task signs, another has to know before it signs anything
            if rounds.may_sign(self.state, verdict.version, time.monotonic(), self._rules, accept=verdict.accept):
                await self._publish("verdict", self._key.sign("verdict", verdict))

    async def _publish(self, kind: str, record: bytes) -> None:
        """Stored before it is said, so that a restart can't say something else."""
        refs = intake.needed_blobs(self._lineage, kind, record)
        ref = await asyncio.to_thread(intake.store, self._lineage, kind, record, refs)
        self._lineage.refresh()
        if kind == "verdict":
            self._advance(round_state.VerdictSeen(self._lineage.verdicts[ref.digest]))
        await self._announce(kind, ref)
        await self.on_record(kind, ref.digest)
