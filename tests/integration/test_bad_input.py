"""What strangers may send instead of blobs and patches: refused in one sentence, bounded, and nothing left behind."""

import gzip
import os
import resource
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from p2pmodel.domain.errors import P2PModelError, Rejected, Unreachable
from p2pmodel.domain.model import BlobRef
from p2pmodel.engine.exams import Suite
from p2pmodel.node.lineages.intake import take_in
from p2pmodel.node.versions.checkout import verify_folder
from p2pmodel.store.home import Home
from p2pmodel.swarm import blobs
from p2pmodel.swarm.blobs import BlobFetcher, BlobHeader, BlobRequest, BlobServer
from p2pmodel.swarm.rpc import Channel, Service
from p2pmodel.wire import bundle, canonical, records
from p2pmodel.wire.signing import Key
from tests.support.factories import manifest
from tests.support.factories import patch as any_patch
from tests.support.lineages import begin
from tests.support.swarm import Members, swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
ANNOUNCED = BlobRef(canonical.digest(b"what was announced"), 1 << 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Members]:
    async with swarm(tmp_path_factory.mktemp("keys"), 2) as members:
        yield members


def left(home: Home) -> list[Path]:
    return [p for folder in ("objects", "scratch") for p in (home.path / folder).rglob("*") if p.is_file()]


async def says_ten_gigabytes(channel: Channel, request: BlobRequest) -> None:
    await channel.send(BlobHeader(10 << 30))
    await channel.write(bytes(1 << 20))
    await channel.wait_closed_by_peer(10)


async def never_ends(channel: Channel, request: BlobRequest) -> None:
    await channel.send(BlobHeader(ANNOUNCED.size))
    for _ in range(200):
        await channel.write(bytes(256 << 10), 2)


@pytest.mark.parametrize("answer", [says_ten_gigabytes, never_ends])
async def test_more_than_was_announced_is_not_taken(members: Members, tmp_path: Path, answer: object) -> None:
    async def handle(channel: Channel) -> None:
        await answer(channel, await channel.receive(BlobRequest, 1024))  # type: ignore[operator]

    service, home = Service(members[1][1], blobs.PROTOCOL, handle), Home.open(tmp_path / "home")
    await service.start()
    fetcher = BlobFetcher(members[0][1], home.objects.sink)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Unreachable):
        await fetcher.fetch(ANNOUNCED, [members[1][1].peer])
    await service.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert fetcher.bytes_received <= ANNOUNCED.size
    assert not left(home)


async def test_a_transfer_goes_on_with_the_one_source_that_breaks_off(members: Members, tmp_path: Path) -> None:
    content, asked = os.urandom(1_000_000), []

    async def break_off(channel: Channel) -> None:
        request = await channel.receive(BlobRequest, 1024)
        asked.append(request.offset)
        await channel.send(BlobHeader(len(content)))
        await channel.write(content[request.offset : request.offset + 300_000])
        channel.close()

    service, home = Service(members[1][1], blobs.PROTOCOL, break_off), Home.open(tmp_path / "home")
    await service.start()
    fetcher = BlobFetcher(members[0][1], home.objects.sink)
    ref = canonical.blob_ref(content)
    assert await fetcher.describe(ref.digest, 1 << 20, [members[1][1].peer]) == ref
    with pytest.raises(Rejected, match="at most 10 are taken"):
        await fetcher.describe(ref.digest, 10, [members[1][1].peer])
    asked.clear()
    await fetcher.fetch(ref, [members[1][1].peer])
    await service.stop()
    assert asked == [0, 300_000, 600_000, 900_000]
    assert home.objects.load(ref.digest) == content


async def test_a_server_reads_no_path_that_a_peer_names(members: Members, tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    (tmp_path / "secret").write_bytes(b"secret")
    server = BlobServer(members[1][1], home.objects)
    await server.start()
    fetcher = BlobFetcher(members[0][1], home.objects.sink)
    for name in ("../secret", "../../secret", f"{'a' * 61}/..", "/etc/passwd"):
        assert home.objects.size(name) is None  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="digest"):
            await fetcher.fetch(BlobRef(name, 6), [members[1][1].peer])  # type: ignore[arg-type]
        with pytest.raises(Rejected):
            home.objects.sink(name, 6)  # type: ignore[arg-type]
    await server.stop()
    assert not left(home)


def bombs() -> dict[str, bytes]:
    """Kilobytes that other programs make gigabytes of."""
    packed = gzip.compress(bytes(16 << 20))
    return {"gzip": packed, "gzip twice": gzip.compress(packed), "nested": b"\x91" * 100_000}


async def test_nothing_is_decompressed(tmp_path: Path) -> None:
    lineage = begin(tmp_path / "home")
    before = left(lineage.home)
    key = lineage.home.key
    for name, raw in bombs().items():
        with pytest.raises(Rejected):
            take_in(lineage, raw)
        with pytest.raises(P2PModelError):
            Suite.unpack(raw, 64 << 20)
        (tmp_path / name).mkdir()
        (tmp_path / name / "proof.msgpack").write_bytes(raw)
        with pytest.raises(P2PModelError):
            verify_folder(tmp_path / name)

        ref = canonical.blob_ref(raw)
        noun = replace(any_patch(key, lineage.model, lineage.head), adapter=ref, fisher=ref)
        with pytest.raises(Rejected) as refused:
            take_in(lineage, bundle.pack(key.sign("patch", noun), raw, raw))
        assert "\n" not in refused.value.message
    assert left(lineage.home) == before


async def test_files_of_a_manifest_stay_in_their_folder() -> None:
    key = Key.generate()
    honest = msgspec.to_builtins(manifest(key), builtin_types=(bytes,))
    for name in ("../config.json", "/etc/passwd", "a/../../b", "..", ".hidden", "a\\b"):
        honest["files"] = [{**honest["files"][0], "name": name}]
        with pytest.raises(Rejected) as refused:
            records.open_manifest(key.sign("manifest", honest))
        assert refused.value.reason == "schema"
