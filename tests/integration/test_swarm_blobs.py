"""Blobs and anti-entropy between real peers: what breaks off, lies, stalls or is refused."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from p2pmodel.domain.errors import NotFound, PeerFailed, Rejected, StorageError, Unreachable
from p2pmodel.domain.ids import Digest, ModelId, PeerId
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import LineageOffer
from p2pmodel.node.lineages import discovery
from p2pmodel.swarm import blobs, rpc, sync
from p2pmodel.swarm.blobs import BlobFetcher, BlobHeader, BlobRequest, BlobServer
from p2pmodel.swarm.rpc import Channel, Refused, Service, open_channel
from p2pmodel.wire import canonical
from tests.support.factories import blob
from tests.support.swarm import Members, swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL = canonical.digest(b"model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Members]:
    async with swarm(tmp_path_factory.mktemp("keys"), 3) as members:
        yield members


class Blobs:
    """A source and a sink in memory."""

    def __init__(self, *contents: bytes) -> None:
        self.held = {canonical.digest(content): content for content in contents}
        self.aborted = 0

    def size(self, digest: Digest) -> int | None:
        return len(self.held[digest]) if digest in self.held else None

    def read(self, digest: Digest, offset: int, length: int) -> bytes:
        return self.held[digest][offset : offset + length]

    def sink(self, digest: Digest, size: int) -> "Sink":
        return Sink(self, digest)


class Sink:
    def __init__(self, blobs: Blobs, digest: Digest) -> None:
        self.blobs, self.digest, self.content = blobs, digest, bytearray()

    def write(self, chunk: Buffer) -> None:
        self.content += chunk

    def finish(self) -> None:
        if hashlib.sha256(self.content).hexdigest() != self.digest:
            raise Rejected("digest", "These are other bytes than what was asked for.")
        self.blobs.held[self.digest] = bytes(self.content)

    def abort(self) -> None:
        self.blobs.aborted += 1


CONTENT = os.urandom(3_000_001)
REF = blob(CONTENT)
Answer = Callable[[Channel, BlobRequest], Awaitable[None]]


def answering(member: int, answer: Answer, members: Members) -> Service:
    async def handle(channel: Channel) -> None:
        await answer(channel, await channel.receive(BlobRequest, 1024))
        channel.close()

    return Service(members[member][1], blobs.PROTOCOL, handle)


async def fetch(members: Members, ref: BlobRef, *services: BlobServer | Service) -> tuple[Blobs, BlobFetcher]:
    """The first member fetches from the second and the third, in this order."""
    there = Blobs()
    fetcher = BlobFetcher(members[0][1], there.sink)
    for service in services:
        await service.start()
    try:
        await fetcher.fetch(ref, [host.peer for _, host in members[1:]])
    finally:
        for service in services:
            await service.stop()
    return there, fetcher


@pytest.mark.parametrize("content", [CONTENT, b"x", b"", bytes(blobs.CHUNK_BYTES)])
async def test_a_blob_arrives_whole_and_is_counted(members: Members, content: bytes) -> None:
    server = BlobServer(members[1][1], Blobs(content))
    there, fetcher = await fetch(members, blob(content), server)
    assert there.held == {canonical.digest(content): content}
    assert (server.bytes_sent, fetcher.bytes_received) == (len(content), len(content))
    assert there.aborted == 0


async def test_a_blob_that_nobody_has_or_may_serve_is_unreachable(members: Members) -> None:
    servers = (
        BlobServer(members[1][1], Blobs(CONTENT), may_serve=lambda digest: False),
        BlobServer(members[2][1], Blobs(b"another")),
    )
    with pytest.raises(Unreachable):
        await fetch(members, REF, *servers)
    with pytest.raises(Unreachable):
        await fetch(members, REF)  # nobody serves blobs at all


async def test_another_source_goes_on_where_the_first_broke_off(members: Members) -> None:
    async def break_off(channel: Channel, request: BlobRequest) -> None:
        await channel.send(BlobHeader(REF.size))
        await channel.write(CONTENT[:1_000_000])

    whole = BlobServer(members[2][1], Blobs(CONTENT))
    there, fetcher = await fetch(members, REF, answering(1, break_off, members), whole)
    assert there.held[REF.digest] == CONTENT
    assert fetcher.bytes_received == REF.size
    assert whole.bytes_sent < REF.size


async def lie(channel: Channel, request: BlobRequest) -> None:
    await channel.send(BlobHeader(REF.size))
    await channel.write(bytes(REF.size - request.offset))
    await channel.wait_closed_by_peer()


async def lie_and_break_off(channel: Channel, request: BlobRequest) -> None:
    await channel.send(BlobHeader(REF.size))
    await channel.write(bytes(1000))


async def lie_about_the_size(channel: Channel, request: BlobRequest) -> None:
    await channel.send(BlobHeader(1 << 60))


async def talk_nonsense(channel: Channel, request: BlobRequest) -> None:
    await channel.write(os.urandom(100_000))


@pytest.mark.parametrize("answer", [lie, lie_and_break_off, lie_about_the_size, talk_nonsense])
async def test_a_source_that_lies_is_passed_over(members: Members, answer: Answer) -> None:
    there, _ = await fetch(members, REF, answering(1, answer, members), BlobServer(members[2][1], Blobs(CONTENT)))
    assert there.held[REF.digest] == CONTENT


async def test_when_all_sources_lie_nothing_is_kept(members: Members) -> None:
    there = Blobs()
    fetcher = BlobFetcher(members[0][1], there.sink)
    services = [answering(n, lie, members) for n in (1, 2)]
    for service in services:
        await service.start()
    with pytest.raises(Unreachable):
        await fetcher.fetch(REF, [host.peer for _, host in members[1:]])
    for service in services:
        await service.stop()
    assert not there.held
    assert there.aborted == 2


async def test_a_source_that_stalls_or_trickles_is_given_up(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(blobs, "SLOWEST_BYTES_PER_SECOND", REF.size)

    async def stall(channel: Channel, request: BlobRequest) -> None:
        await channel.send(BlobHeader(REF.size))
        await channel.wait_closed_by_peer(20)

    async def trickle(channel: Channel, request: BlobRequest) -> None:
        await channel.send(BlobHeader(REF.size))
        while True:
            await channel.write(b"\0")
            await asyncio.sleep(0.05)

    for answer in (stall, trickle):
        before = time.monotonic()
        with pytest.raises(Unreachable):
            await fetch(members, REF, answering(1, answer, members))
        assert time.monotonic() - before < 15


async def test_a_full_disk_is_said_and_leaves_nothing(members: Members) -> None:
    there = Blobs()

    class FullSink(Sink):
        def write(self, chunk: Buffer) -> None:
            raise StorageError("The disk is full.")

    server = BlobServer(members[1][1], Blobs(CONTENT))
    await server.start()
    with pytest.raises(StorageError):
        await BlobFetcher(members[0][1], lambda digest, size: FullSink(there, digest)).fetch(REF, [members[1][1].peer])
    await server.stop()
    assert there.aborted == 1


async def test_a_peer_that_opens_too_many_streams_is_refused(members: Members) -> None:
    waiting = asyncio.Event()

    async def handle(channel: Channel) -> None:
        await waiting.wait()
        await channel.refuse("served")

    service = Service(members[1][1], "p2pmodel/test/1", handle, streams_per_peer=2)
    await service.start()

    async def ask() -> str:
        async with open_channel(members[0][1], members[1][1].peer, "p2pmodel/test/1") as channel:
            with pytest.raises(Refused) as refused:
                await channel.receive(BlobHeader, 100)
            waiting.set()
            return refused.value.reason

    assert sorted(await asyncio.gather(*(ask() for _ in range(3)))) == ["busy", "served", "served"]
    await service.stop()


async def test_a_caller_that_says_nothing_or_nonsense_is_cut_off(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = BlobServer(members[1][1], Blobs(CONTENT))
    service = Service(members[1][1], "p2pmodel/test/1", server._serve, seconds=0.5)
    await service.start()
    for raw in (b"", b"\x00\xff\xff\xff\xff", b"\x07", rpc._HEADER.pack(0, 4) + b"junk"):
        async with open_channel(members[0][1], members[1][1].peer, "p2pmodel/test/1") as channel:
            await channel.write(raw)
            with pytest.raises(PeerFailed):
                await channel.receive(BlobHeader, 100, 8)
    await service.stop()
    assert not service._tasks


Serve = Callable[[dict[ModelId, list[tuple[str, BlobRef]]]], Awaitable[PeerId]]


@pytest_asyncio.fixture(loop_scope="module")
async def serving(members: Members) -> AsyncIterator[Serve]:
    servers: list[sync.SyncServer] = []

    async def serve(inventory: dict[ModelId, list[tuple[str, BlobRef]]]) -> PeerId:
        def of(model: ModelId) -> list[tuple[str, BlobRef]]:
            if model not in inventory:
                raise NotFound("No such model.")
            return inventory[model]

        offers = [LineageOffer(model, "test", blob(), model) for model in inventory]
        servers.append(sync.SyncServer(members[1][1], of, lambda: offers))
        await servers[-1].start()
        return members[1][1].peer

    yield serve
    for server in servers:
        await server.stop()


def records(count: int) -> list[tuple[str, BlobRef]]:
    return [(("patch", "candidate", "verdict")[n % 3], blob(b"%d" % n)) for n in range(count)]


async def test_a_peer_learns_what_it_lacks_and_no_more(members: Members, serving: Serve) -> None:
    inventory = records(500)
    peer, host = await serving({MODEL: inventory}), members[0][1]
    digests = [ref.digest for _, ref in inventory]
    by_digest = sorted(inventory, key=lambda item: item[1].digest)
    assert await sync.missing(host, peer, MODEL, []) == by_digest
    assert await sync.missing(host, peer, MODEL, digests) == []
    assert await sync.missing(host, peer, MODEL, [*digests, blob(b"only here").digest]) == []
    assert await sync.missing(host, peer, MODEL, digests[2:]) == sorted(inventory[:2], key=lambda item: item[1].digest)
    assert await sync.missing(host, peer, canonical.digest(b"another"), digests) == []
    assert await sync.lineages(host, peer) == [LineageOffer(MODEL, "test", blob(), MODEL)]


async def test_more_than_one_answer_holds_comes_in_several(members: Members, serving: Serve) -> None:
    inventory = records(sync.MAX_MISSING + 2000)
    peer, host = await serving({MODEL: inventory}), members[0][1]
    first = await sync.missing(host, peer, MODEL, [])
    assert len(first) == sync.MAX_MISSING
    rest = await sync.missing(host, peer, MODEL, [ref.digest for _, ref in first])
    assert {*first, *rest} == set(inventory)


async def test_what_is_no_record_is_left_out(members: Members, serving: Serve) -> None:
    peer = await serving({MODEL: [("weights", blob(b"weights")), *records(1)]})
    assert await sync.missing(members[0][1], peer, MODEL, []) == records(1)


async def test_a_peer_without_the_service_fails_by_name(members: Members) -> None:
    for call in (
        sync.lineages(members[0][1], members[2][1].peer),
        sync.missing(members[0][1], members[2][1].peer, MODEL, []),
    ):
        with pytest.raises(PeerFailed) as failed:
            await call
        assert failed.value.peer == members[2][1].peer


async def test_a_peer_that_answers_little_by_little_is_not_listened_to_for_ever(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dribble(channel: Channel) -> None:
        await channel.receive(sync.Question, 1 << 14)
        await channel.send(sync.Summary(False, os.urandom(256 * 16)))
        while True:
            await channel.receive(sync.Want, 1 << 14)
            await asyncio.sleep(0.1)
            await channel.send(sync.Listing((), 1))

    monkeypatch.setattr(sync, "MISSING_SECONDS", 1.0)
    service = Service(members[1][1], sync.PROTOCOL, dribble)
    await service.start()
    try:
        with pytest.raises(PeerFailed, match="took longer"):
            await sync.missing(members[0][1], members[1][1].peer, MODEL, [])
    finally:
        await service.stop()


async def test_a_peer_that_answers_nonsense_keeps_nobody_from_asking_the_others(
    members: Members, serving: Serve
) -> None:
    async def talk(channel: Channel) -> None:
        await channel.receive(sync.Question, 1 << 14)
        await channel.send("nonsense")

    service = Service(members[2][1], sync.PROTOCOL, talk)
    await service.start()
    try:
        peers = [members[2][1].peer, await serving({MODEL: []})]
        assert set(await discovery._offers(members[0][1], peers)) == {MODEL}
    finally:
        await service.stop()
