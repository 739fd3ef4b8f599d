"""`p2pmodel gc` on homes whose lineages have grown."""

import asyncio
import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch

from p2pmodel.domain.errors import StorageError, UsageError
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.version import LeftOut
from p2pmodel.engine.exams import Suite
from p2pmodel.engine.training.resuming import Progress
from p2pmodel.node.lineages.exchange import Exchange
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.retention import DAY, collect_garbage
from p2pmodel.node.lineages.states import patch_state, round_mean, version_state
from p2pmodel.node.patches.continuity import bequeath, inherited
from p2pmodel.node.patches.savepoints import Savepoints
from p2pmodel.node.rounds import asides
from p2pmodel.node.versions.checkout import verify_version
from p2pmodel.store.fsck import fsck
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobServer
from p2pmodel.swarm.sync import SyncServer
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.lineages import accept, add_patch, adopt, begin, exam_of, grow
from tests.support.swarm import swarm
from tests.support.waiting import soon


def age(lineage: Lineage, days: float) -> None:
    """As if everything had come so long ago."""
    then = time.time() - days * DAY
    for digest in lineage.home.objects.digests():
        os.utime(lineage.home.objects.path(digest), (then, then))
    lineage.home.index._run(lambda sql: sql.execute("UPDATE records SET seen = ?", (then,)))


def test_what_was_left_out_goes_and_every_version_stays(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    objects = lineage.home.objects
    merged, late = add_patch(lineage, Key.generate(), 1), add_patch(lineage, Key.generate(), 2)
    own = add_patch(lineage, lineage.home.key, 3)
    adopt(lineage, [merged], [LeftOut(late, "worse"), LeftOut(own, "worse")])
    grow(lineage, 3, patches=2)
    waiting = add_patch(lineage, Key.generate(), 4)
    orphan = objects.put(b"orphan").digest
    assert ("patch", late) in [(kind, ref.digest) for kind, ref in lineage.inventory()]
    before = set(objects.digests())
    assert collect_garbage(lineage.home, 30).objects == 0
    age(lineage, 31)
    planned = collect_garbage(lineage.home, 30, dry_run=True)
    assert set(objects.digests()) == before
    done = collect_garbage(lineage.home, 30)
    gone = before - set(objects.digests())
    assert done == planned
    assert gone == {orphan, *(ref.digest for ref in lineage.patches[late].blobs)} - {
        ref.digest for i, p in lineage.patches.items() if i != late for ref in p.blobs
    }
    assert len(gone) == done.objects == 2  # the Fishers of all of these patches are the same
    fresh = Lineage(lineage.home, lineage.model)
    assert verify_version(fresh, fresh.head)[1] == 4
    for patch in (merged, own, waiting):
        assert patch_state(fresh, fresh.patches[patch])
    assert ("patch", late) not in [(kind, ref.digest) for kind, ref in fresh.inventory()]
    assert fresh.knows(late)  # so that it is not fetched again
    assert not fsck(lineage.home).dangling_refs
    assert collect_garbage(lineage.home, 30).objects == 0


def test_a_training_under_way_keeps_its_states(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    savepoints = Savepoints(lineage, canonical.digest(b"key"))
    state, checkpoint, sums = (savepoints.keep(raw) for raw in (b"state", b"checkpoint", b"sums"))
    savepoints.note(Progress(1, state, sums, (checkpoint,), (state,), (1.0,), (2.0,), 8))
    age(lineage, 31)
    assert collect_garbage(lineage.home, 30).objects == 0
    assert savepoints.found() is not None


def test_what_the_optimiser_learned_on_old_versions_goes(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    for number in range(4):
        parent = lineage.head
        bequeath(lineage, "ia3@1", parent, "layout", b"moments %d" % number, {"a": torch.ones(number + 1)}, None)
        grow(lineage, 1)
    age(lineage, 31)
    wanted = inherited(lineage, "ia3@1", lineage.head, "layout")
    assert wanted is not None
    assert collect_garbage(lineage.home, 30).objects == 6
    still = inherited(lineage, "ia3@1", lineage.head, "layout")
    assert still is not None
    assert (still.digest, still.moments) == (wanted.digest, wanted.moments)
    assert len(lineage.home.refs.names(f"models/{lineage.model}/contributing")) == 1


def test_nothing_goes_where_that_is_not_safe(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    (version,) = grow(lineage, 1)
    age(lineage, 31)
    with pytest.raises(UsageError, match="last hour"):
        collect_garbage(lineage.home, 0)
    for days in (float("nan"), -1.0):
        with pytest.raises(UsageError):
            collect_garbage(lineage.home, days)
    verdict = next(iter(lineage.verdicts))
    lineage.home.objects.remove(Digest(verdict))
    with pytest.raises(StorageError):
        collect_garbage(lineage.home, 30)
    assert version_state(lineage, version)


def amend(lineage: Lineage, folder: Path, text: str, *, adopted: bool = True) -> Digest:
    """An amendment that brings an exam of this text: the exam's digest."""
    folder.mkdir()
    exam = lineage.home.objects.put(Suite.load(exam_of(folder, text)).pack())
    _, version = asides.propose_amendment(lineage, dataclasses.replace(lineage.manifest.amendment, exam=exam))
    if adopted:
        accept(lineage, lineage.candidates[version])
    return exam.digest


class Silent:
    async def on_record(self, kind: str, digest: Digest) -> None: ...

    def on_refused(self, kind: str, reason: str) -> None:
        raise AssertionError(f"a {kind} was refused: {reason}")


async def test_who_joins_late_reaches_the_head_by_a_node_alone_that_has_collected(tmp_path: Path) -> None:
    there = begin(tmp_path / "there")
    mean = {name: torch.full_like(value, 0.5) for name, value in version_state(there, there.head).items()}
    first = adopt(there, [add_patch(there, Key.generate(), 1)], mean=mean)
    exams = [there.manifest.exam.digest, *(amend(there, tmp_path / text, text) for text in ("one", "two"))]
    adopt(there, [add_patch(there, Key.generate(), 2)], mean=mean)
    late = add_patch(there, Key.generate(), 3)
    grow(there, 1)
    exams.append(amend(there, tmp_path / "three", "three", adopted=False))
    age(there, 31)
    assert collect_garbage(there.home, 30).objects == 1  # the late patch's adapter
    assert not there.home.objects.has(there.patches[late].adapter.digest)
    there = Lineage(there.home, there.model)

    here = Lineage.create(Home.open(tmp_path / "here"), there.home.objects.load(there.model))
    here.home.objects.put(there.home.objects.load(here.founding.exam.digest))  # as every node brings it in
    (folder := tmp_path / "keys").mkdir()
    async with swarm(folder, 2) as ((_, mine), (holder, other)):
        blobs, sync = BlobServer(other, there.home.objects), SyncServer(other, lambda _: there.inventory(), tuple)
        await blobs.start()
        await sync.start()
        exchange = Exchange(mine, here, Silent())
        fetching = asyncio.create_task(exchange.run())
        await exchange.ask(holder.peer)
        await soon(lambda: set(there.known_records()) - set(here.known_records()) == {late})
        fetching.cancel()
        await sync.stop()
        await blobs.stop()
    assert here.head == there.head
    assert here.manifest.exam.digest == exams[2]
    assert all(here.home.objects.has(exam) for exam in exams)
    values = version_state(there, there.head)
    assert all(torch.equal(value, values[name]) for name, value in version_state(here, here.head).items())
    found = round_mean(here, first, "ia3@1")
    assert found is not None
    assert all(torch.equal(found[name], mean[name]) for name in found)
    assert verify_version(here, here.head)[1] == len(here.versions)
