"""Records of strangers that are not what they are called, or name what is not theirs: nothing that was here is lost."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from p2pmodel.domain.ids import Digest, PatchId
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.version import LeftOut, Verdict
from p2pmodel.node.lineages.exchange import Exchange
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobServer
from p2pmodel.swarm.sync import SyncServer
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin
from tests.support.swarm import Members, swarm
from tests.support.waiting import soon

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Members]:
    async with swarm(tmp_path_factory.mktemp("keys"), 2) as members:
        yield members


class Heard:
    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    async def on_record(self, kind: str, digest: Digest) -> None: ...

    def on_refused(self, kind: str, reason: str) -> None:
        self.refused.append((kind, reason))


class Node:
    """What `there` has, `here` may fetch; `there` does as a test says."""

    def __init__(self, members: Members, folder: Path) -> None:
        self.there = begin(folder / "there")
        self.here = Lineage.create(Home.open(folder / "here"), self.there.home.objects.load(self.there.model))
        self.heard = Heard()
        self.exchange = Exchange(members[0][1], self.here, self.heard)
        self.peer = members[1][1].peer

    @property
    def objects(self) -> set[Digest]:
        return set(self.here.home.objects.digests())

    def hear(self, kind: str, digest: Digest) -> None:
        self.exchange.hear(kind, BlobRef(digest, self.there.home.objects.size(digest) or 0), self.peer)

    async def bring(self, patch: PatchId) -> None:
        self.hear("patch", patch)
        await soon(lambda: patch in self.here.patches)

    def sign(self, key: Key, **changes: object) -> PatchId:
        """A patch as one that `there` has, but for these changes; its record is there."""
        known = next(iter(self.there.patches.values()))
        noun = dataclasses.replace(known, contributor=key.peer, **changes)  # type: ignore[arg-type]
        return PatchId(self.there.home.objects.put(key.sign("patch", noun)).digest)


@pytest_asyncio.fixture(loop_scope="module")
async def node(members: Members, tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(members, tmp_path)
    blobs = BlobServer(members[1][1], node.there.home.objects)
    sync = SyncServer(members[1][1], lambda model: node.there.inventory(), lambda: [])
    await blobs.start()
    await sync.start()
    fetching = asyncio.create_task(node.exchange.run())
    yield node
    fetching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await fetching
    await sync.stop()
    await blobs.stop()


async def test_a_blob_that_is_called_a_record_stays(node: Node) -> None:
    patch = add_patch(node.there, Key.generate(), seed=1)
    await node.bring(patch)
    before = node.objects
    adapter = node.there.patches[patch].adapter
    node.exchange.hear("verdict", BlobRef(adapter.digest, 100), node.peer)
    node.exchange.hear("candidate", BlobRef(node.here.model, 100), node.peer)
    await soon(lambda: node.heard.refused and not node.exchange._fetches)
    assert {kind for kind, _ in node.heard.refused} == {"verdict"}
    assert node.objects == before


async def test_a_patch_whose_blobs_are_others_records_takes_nothing_away(node: Node) -> None:
    honest = add_patch(node.there, Key.generate(), seed=1)
    await node.bring(honest)
    before = node.objects
    manifest = BlobRef(node.here.model, node.there.home.objects.size(node.here.model) or 0)
    hostile = node.sign(Key.generate(), adapter=manifest)
    node.hear("patch", hostile)
    await soon(lambda: node.heard.refused)
    await soon(lambda: node.objects == before)
    assert Lineage(node.here.home, node.here.model).patches.keys() == {honest}


async def test_what_a_refused_patch_brought_in_goes_but_not_what_another_one_needs(node: Node) -> None:
    honest = add_patch(node.there, Key.generate(), seed=1)
    before = node.objects
    nonsense = node.there.home.objects.put(b"no tensors at all")
    node.hear("patch", node.sign(Key.generate(), adapter=nonsense))
    await soon(lambda: node.heard.refused)
    await soon(lambda: node.objects == before)
    fisher_of_honest = node.sign(Key.generate(), adapter=nonsense, samples=2)
    node.hear("patch", fisher_of_honest)
    node.hear("patch", honest)
    await soon(lambda: honest in node.here.patches and len(node.heard.refused) == 2)
    assert node.here.home.objects.has(node.here.patches[honest].fisher.digest)
    assert not node.here.home.objects.has(nonsense.digest)


async def test_a_record_under_a_wrong_name_is_taken_under_its_own(node: Node) -> None:
    patch = add_patch(node.there, Key.generate(), seed=1)
    node.hear("verdict", patch)
    await soon(lambda: node.heard.refused == [("verdict", "kind")])
    node.hear("verdict", patch)
    assert len(node.exchange._backlog) == 0
    assert await node.exchange.ask(node.peer) == 1, "the peer that has it names it again"
    await soon(lambda: patch in node.here.patches)


async def test_of_two_patches_of_a_contributor_the_one_that_a_candidate_names_comes_in_as_well(node: Node) -> None:
    key = Key.generate()
    first = add_patch(node.there, key, seed=1)
    second = node.sign(key, samples=2)
    await node.bring(first)
    node.hear("patch", second)
    await soon(lambda: node.heard.refused == [("patch", "duplicate")])
    node.there.home.index.add(dataclasses.replace(node.there.home.index.find(first)[0], record=_ref(node, second)))
    node.there.refresh()
    adopt(node.there, [second], [LeftOut(add_patch(node.there, Key.generate(), seed=2), "worse")])
    await node.exchange.ask(node.peer)
    await soon(lambda: len(node.here.candidates) == 1)
    await node.exchange.ask(node.peer)
    await soon(lambda: second in node.here.patches)


async def test_both_patches_of_a_contributor_at_once_are_one(node: Node) -> None:
    key = Key.generate()
    add_patch(node.there, key, seed=1)
    both = [node.sign(key, samples=samples) for samples in (2, 3)]
    for patch in both:
        node.hear("patch", patch)
    await soon(lambda: node.heard.refused == [("patch", "duplicate")])
    assert len(node.here.patches) == 1


async def test_a_round_takes_as_many_patches_as_the_manifest_says(node: Node) -> None:
    schedule = dataclasses.replace(node.here.founding.schedule, min_patches=1, max_patches=2)
    node.here.founding = dataclasses.replace(node.here.founding, schedule=schedule)
    for seed in (1, 2):
        await node.bring(add_patch(node.there, Key.generate(), seed))
    before = node.objects
    node.hear("patch", add_patch(node.there, Key.generate(), seed=3))
    await soon(lambda: node.heard.refused == [("patch", "patches")])
    await soon(lambda: node.objects == before)


async def test_a_defect_in_taking_one_in_does_not_end_the_others(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(kind: str, digest: Digest) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(node.heard, "on_record", fail)
    patches = [add_patch(node.there, Key.generate(), seed) for seed in range(10)]
    for patch in patches:
        node.hear("patch", patch)
    await soon(lambda: set(patches) <= node.here.patches.keys())


async def test_a_verdict_of_a_round_that_no_index_holds_is_refused(node: Node) -> None:
    home = node.there.home
    verdict = Verdict(home.key.peer, node.there.model, 1, canonical.digest(b"unknown"), True, "", ())
    object.__setattr__(verdict, "round", 2**63)
    node.hear("verdict", home.objects.put(home.key.sign("verdict", verdict)).digest)
    await soon(lambda: node.heard.refused == [("verdict", "schema")])


def _ref(node: Node, digest: Digest) -> BlobRef:
    return BlobRef(digest, node.there.home.objects.size(digest) or 0)


@pytest.mark.parametrize("turns", range(5))
async def test_it_ends_when_it_is_told_to_as_something_comes(node: Node, turns: int) -> None:
    exchange = Exchange(node.exchange._host, node.here, node.heard)
    running = asyncio.create_task(exchange.run())
    for _ in range(3):  # it waits then
        await asyncio.sleep(0)
    exchange._changed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=5)
    assert running in done
