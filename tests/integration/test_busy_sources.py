"""A source that serves others already is asked again: nothing is lost because everybody came at once."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from p2pmodel.domain.errors import Busy
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef
from p2pmodel.node.lineages import exchange as exchange_room
from p2pmodel.node.lineages.exchange import Exchange
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.store.home import Home
from p2pmodel.swarm import blobs
from p2pmodel.swarm.blobs import BlobFetcher, BlobServer
from p2pmodel.swarm.rpc import open_channel
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.factories import candidate
from tests.support.lineages import add_patch, begin
from tests.support.swarm import Members, swarm
from tests.support.waiting import soon

pytestmark = pytest.mark.asyncio(loop_scope="module")
STREAMS_PER_PEER = 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Members]:
    async with swarm(tmp_path_factory.mktemp("keys"), 2) as members:
        yield members


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    return begin(tmp_path_factory.mktemp("there"))


@pytest_asyncio.fixture(loop_scope="module")
async def server(members: Members, there: Lineage) -> AsyncIterator[BlobServer]:
    server = BlobServer(members[1][1], there.home.objects)
    await server.start()
    yield server
    await server.stop()


@contextlib.asynccontextmanager
async def all_streams_taken(members: Members, server: BlobServer) -> AsyncIterator[None]:
    """All that the second member has for the first: as many that say nothing."""
    async with contextlib.AsyncExitStack() as streams:
        for _ in range(STREAMS_PER_PEER):
            channel = open_channel(members[0][1], members[1][1].peer, blobs.PROTOCOL)
            await streams.enter_async_context(channel)
        await soon(lambda: server._service._open.total() == STREAMS_PER_PEER)
        yield


class Nobody:
    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    async def on_record(self, kind: str, digest: Digest) -> None: ...

    def on_refused(self, kind: str, reason: str) -> None:
        self.refused.append((kind, reason))


async def test_a_record_of_a_busy_holder_is_fetched_later(
    members: Members, there: Lineage, server: BlobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    patch = add_patch(there, Key.generate(), seed=1)
    here = Lineage.create(Home.open(tmp_path), there.home.objects.load(there.model))
    exchange = Exchange(members[0][1], here, Nobody())
    fetching = asyncio.create_task(exchange.run())
    async with all_streams_taken(members, server):
        exchange.hear("patch", BlobRef(patch, there.home.objects.size(patch) or 0), members[1][1].peer)
        await soon(lambda: "1 of 1 peers that may have it are busy" in caplog.text)
        assert patch not in here.patches
    await soon(lambda: patch in here.patches)
    fetching.cancel()


async def test_a_record_whose_parent_does_not_come_counts_as_refused_once(
    members: Members, there: Lineage, server: BlobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_room, "ORPHAN_TRIES", 0)
    here, nobody = Lineage.create(Home.open(tmp_path), there.home.objects.load(there.model)), Nobody()
    noun = candidate(there.model, parent=canonical.digest(b"never seen"))
    exchange = Exchange(members[0][1], here, nobody)
    exchange.hear("candidate", there.home.objects.put(there.home.key.sign("candidate", noun)), members[1][1].peer)
    fetching = asyncio.create_task(exchange.run())
    await soon(lambda: nobody.refused)
    await soon(lambda: next(iter(exchange._backlog.entries.values())).failures > 1)
    fetching.cancel()
    assert nobody.refused == [("candidate", "parent")]


async def test_busy_is_not_the_same_as_not_there_and_patience_outlasts_it(
    members: Members, there: Lineage, server: BlobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    home, ref = Home.open(tmp_path), there.manifest.exam
    fetcher = BlobFetcher(members[0][1], home.objects.sink)
    patient = BlobFetcher(members[0][1], home.objects.sink, patience=20.0)
    async with all_streams_taken(members, server):
        with pytest.raises(Busy, match="1 of 1 peers"):
            await fetcher.fetch(ref, [members[1][1].peer])
        with pytest.raises(Busy):
            await fetcher.describe(ref.digest, ref.size, [members[1][1].peer])
        caplog.clear()
        waiting = asyncio.create_task(patient.fetch(ref, [members[1][1].peer]))
        await soon(lambda: "refused: busy" in caplog.text)
    await waiting
    assert home.objects.has(ref.digest)
