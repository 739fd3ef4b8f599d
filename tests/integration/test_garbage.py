"""`p2pmodel gc` on homes whose lineages have grown."""

import os
import time
from pathlib import Path

import pytest
import torch

from p2pmodel.domain.errors import StorageError, UsageError
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.version import LeftOut
from p2pmodel.engine.training.resuming import Progress
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.retention import DAY, collect_garbage
from p2pmodel.node.lineages.states import patch_state, version_state
from p2pmodel.node.patches.continuity import bequeath, inherited
from p2pmodel.node.patches.savepoints import Savepoints
from p2pmodel.node.versions.checkout import verify_version
from p2pmodel.store.fsck import fsck
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.lineages import add_patch, adopt, begin, grow


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
