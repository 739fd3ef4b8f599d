"""What a maintainer's node does when an examination fails, or cannot begin; what it keeps of rounds that are over."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from p2pmodel.domain.errors import NotRunning, StorageError, Unreachable
from p2pmodel.domain.ids import PatchId, PeerId, VersionId
from p2pmodel.domain.model import BlobRef, Schedule
from p2pmodel.domain.version import Verdict
from p2pmodel.logic.round_state import Phase
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.intake import needed_blobs, store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.rounds import asides, roundkeeper
from p2pmodel.node.rounds.roundkeeper import RoundKeeper
from p2pmodel.telemetry.metrics import Metrics
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin, bring, copied
from tests.support.waiting import soon


class Examining:
    """In a maintainer's place; fails as often as it was told to."""

    def __init__(self, lineage: Lineage, me: PeerId, failures: int = 0) -> None:
        self.lineage, self.me, self.failures, self.asked = lineage, me, failures, 0

    def examine(self, version: VersionId) -> Verdict:
        self.asked += 1
        if self.asked <= self.failures:
            raise StorageError("The disk is full.")
        return Verdict(self.me, self.lineage.model, self.lineage.candidates[version].round, version, True, "", ())


async def nothing(*_: object) -> None: ...


@contextlib.asynccontextmanager
async def keeping(
    lineage: Lineage,
    key: Key,
    maintainer: Any,
    find: Callable[[], None] = lambda: None,
    adopted: Callable[[VersionId], Awaitable[None]] = nothing,
    ask: bool = False,
) -> AsyncIterator[RoundKeeper]:

    async def find_patches(patches: Collection[PatchId], first: Collection[PeerId]) -> None:
        assert key.peer in first
        find()

    keeper = RoundKeeper(lineage, key, maintainer, nothing, adopted, find_patches, Metrics(), ask)
    running = asyncio.create_task(keeper.run())
    yield keeper
    assert not running.done(), running.exception()
    running.cancel()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roundkeeper, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(roundkeeper, "TICK_SECONDS", 0.05)


async def test_an_examination_that_fails_is_tried_again(tmp_path: Path) -> None:
    made = begin(tmp_path / "made")
    version = adopt(made, [add_patch(made, Key.generate(), 1)])
    lineage = copied(made, tmp_path / "here", "patch", "candidate")
    examining = Examining(lineage, made.home.key.peer, failures=2)
    async with keeping(lineage, made.home.key, examining):
        await soon(lambda: lineage.head == version)
    assert examining.asked == 3


async def test_a_candidate_whose_patches_are_not_here_is_judged_when_they_are(tmp_path: Path) -> None:
    made = begin(tmp_path / "made")
    version = adopt(made, [add_patch(made, Key.generate(), 1)])
    lineage = copied(made, tmp_path / "here", "candidate")
    searches = 0

    def find() -> None:
        nonlocal searches
        searches += 1
        if searches == 2:
            bring(made, lineage, "patch")

    examining = Examining(lineage, made.home.key.peer)
    async with keeping(lineage, made.home.key, examining, find):
        await soon(lambda: lineage.head == version)
    assert (searches, examining.asked) == (2, 1)


async def test_a_round_does_not_end_a_second_time_while_the_node_takes_the_version(tmp_path: Path) -> None:
    made = begin(tmp_path / "made")
    adopt(made, [add_patch(made, Key.generate(), 1)])
    lineage = copied(made, tmp_path / "here", "patch", "candidate")
    loaded = asyncio.Event()

    async def adopted(version: VersionId) -> None:
        await loaded.wait()
        raise Unreachable("Nobody can be told of it now.")

    async with keeping(lineage, made.home.key, Examining(lineage, made.home.key.peer), adopted=adopted) as keeper:
        await soon(lambda: lineage.head != made.model)
        before = keeper.state
        verdict = next(iter(lineage.verdicts))
        await keeper.on_record("verdict", verdict)
        assert keeper.state is before
        loaded.set()
        await soon(lambda: keeper.state.parent == lineage.head)
        assert (keeper.state.round, keeper.state.phase) == (2, Phase.OPEN)


async def test_verdicts_of_rounds_that_are_over_are_not_kept(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    adopt(lineage, [add_patch(lineage, Key.generate(), 1)])
    async with keeping(lineage, lineage.home.key, None) as keeper:
        await asyncio.sleep(0)
        assert keeper.state.votes == ()
        assert keeper.state.round == 2


class Proposing(Examining):
    """Works on a candidate until nobody wants it any more; then fails, or has one, as it was told to."""

    def __init__(self, lineage: Lineage, me: PeerId, ends: str) -> None:
        super().__init__(lineage, me)
        self.ends, self.begun = ends, 0

    def propose(self, round: int, parent: VersionId, patches: tuple[PatchId, ...], wanted: Callable[[], bool]) -> None:
        self.begun += 1
        while wanted():
            threading.Event().wait(0.01)
        if self.ends == "raises":
            raise NotRunning("The candidate is not wanted any more.")


@pytest.mark.parametrize("ends", ["raises", "has nothing"])
async def test_work_on_a_candidate_ends_when_another_one_comes_and_that_is_examined(tmp_path: Path, ends: str) -> None:
    made = begin(tmp_path / "made")
    patch = add_patch(made, Key.generate(), 1)
    version = adopt(made, [patch])
    lineage = copied(made, tmp_path / "here", "patch")
    lineage.manifest = dataclasses.replace(lineage.manifest, schedule=Schedule(min_patches=1))
    proposing = Proposing(lineage, made.home.key.peer, ends)
    async with keeping(lineage, made.home.key, proposing) as keeper:
        await soon(lambda: proposing.begun)
        assert keeper.state.phase is Phase.SEALED
        bring(made, lineage, "candidate")
        (row,) = lineage.home.index.records(lineage.model, "candidate")
        await keeper.on_record("candidate", row.record.digest)
        await soon(lambda: lineage.head == version)
    assert (proposing.begun, proposing.asked) == (1, 1)
    assert patch not in keeper.state.settled


async def test_a_verdict_that_cannot_be_stored_now_is_given_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = begin(tmp_path / "made")
    version = adopt(made, [add_patch(made, Key.generate(), 1)])
    lineage = copied(made, tmp_path / "here", "patch", "candidate")
    refused = 0

    def full(*arguments: Any) -> BlobRef:
        nonlocal refused
        refused += 1
        if refused < 4:
            raise StorageError("The disk is full.")
        return store(*arguments)

    monkeypatch.setattr(intake, "store", full)
    async with keeping(lineage, made.home.key, Examining(lineage, made.home.key.peer), ask=True) as keeper:
        await soon(lambda: keeper.state.phase is Phase.VOTING)
        lineage.notes.decide(version, True)
        await soon(lambda: keeper.state.parent == version)
    assert refused == 4
    assert len(lineage.verdicts) == 1


async def test_of_two_amendments_that_are_approved_the_first_leaves_nothing_to_say_of_the_other(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    versions = []
    for seconds in (100.0, 200.0):
        schedule = dataclasses.replace(lineage.manifest.schedule, open_seconds=seconds)
        amendment = dataclasses.replace(lineage.manifest.amendment, schedule=schedule)
        versions.append(asides.propose_amendment(lineage, amendment)[1])
        lineage.heard[versions[-1]] -= 1000  # or the second could not be proposed yet
    async with keeping(lineage, lineage.home.key, Examining(lineage, lineage.home.key.peer)) as keeper:
        await soon(lambda: lineage.head in versions)
        await soon(lambda: keeper.state.parent == lineage.head)
        await keeper.on_record("verdict", next(iter(lineage.verdicts)))
    assert len(lineage.versions) == 1


async def test_an_amendment_is_examined_when_its_person_has_decided(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    examining = Examining(lineage, lineage.home.key.peer)
    limits = dataclasses.replace(lineage.manifest.limits, regression_tolerance=0.125)
    async with keeping(lineage, lineage.home.key, examining) as keeper:
        record, version = asides.propose_amendment(
            lineage, dataclasses.replace(lineage.manifest.amendment, limits=limits)
        )
        lineage.home.refs.delete(f"models/{lineage.model}/decisions/{version}")
        await keeper.on_record("candidate", record)
        await soon(lambda: keeper._named)
        assert (examining.asked, keeper.state.phase) == (0, Phase.OPEN)
        lineage.notes.decide(version, accept=True)
        await soon(lambda: lineage.head == version)
        await soon(lambda: keeper.state.parent == version)
    assert examining.asked == 1


async def test_who_proposes_what_another_has_proposed_does_not_take_the_others_turn_from_it(tmp_path: Path) -> None:
    other = Key.generate()
    lineage = begin(tmp_path, others=[other])
    version = adopt(lineage, [add_patch(lineage, Key.generate(), 1)])
    record = other.sign("candidate", lineage.candidates[version])
    store(lineage, "candidate", record, needed_blobs(lineage, "candidate", record))
    lineage.refresh()
    assert lineage.proposers[version] == (lineage.home.key.peer, other.peer)
    async with keeping(lineage, lineage.home.key, Examining(lineage, lineage.home.key.peer)) as keeper:
        await asyncio.sleep(0)
        assert {c.proposer for c in keeper.state.candidates} == {lineage.home.key.peer, other.peer}
