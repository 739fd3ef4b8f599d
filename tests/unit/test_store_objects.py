"""Objects: what is put is what is loaded, what is wrong is never seen, and what dead writers left goes away."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pmodel.domain.errors import NotFound, Rejected, StorageError
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef
from p2pmodel.store.home import Home
from p2pmodel.wire import canonical

ABSENT = canonical.digest(b"absent")
same_home = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home.open(tmp_path / "home")
    yield home
    home.close()


def file_of(home: Home, digest: str) -> Path:
    return home.path / "objects" / digest[:2] / digest[2:]


def damage(home: Home, digest: str) -> None:
    path = file_of(home, digest)
    raw = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def unfinished(home: Home) -> list[str]:
    return os.listdir(home.path / "scratch")


@same_home
@given(raw=st.binary(max_size=5000), offset=st.integers(0, 6000), length=st.integers(0, 6000))
def test_what_is_put_is_what_is_read(home: Home, raw: bytes, offset: int, length: int) -> None:
    ref = home.objects.put(raw)
    assert ref == BlobRef(canonical.digest(raw), len(raw)) == home.objects.put(raw)
    assert home.objects.load(ref.digest) == raw == home.objects.path(ref.digest).read_bytes()
    assert home.objects.read(ref.digest, offset, length) == raw[offset : offset + length]
    assert home.objects.size(ref.digest) == len(raw)
    assert not unfinished(home)


@same_home
@given(chunks=st.lists(st.binary(max_size=300), max_size=8), extra=st.integers(-3, 3), flip=st.booleans())
def test_a_sink_shows_only_what_was_promised(home: Home, chunks: list[bytes], extra: int, flip: bool) -> None:
    raw = b"".join(chunks)
    digest, size = canonical.digest(raw + b"?" * flip), max(0, len(raw) + extra)
    known = home.objects.has(digest)

    def receive() -> None:
        sink = home.objects.sink(digest, size)
        for chunk in chunks:
            sink.write(memoryview(bytearray(chunk)))
        sink.finish()

    if size == len(raw) and not flip:
        receive()
        assert home.objects.load(digest) == raw
    else:
        with pytest.raises(Rejected) as refused:
            receive()
        assert refused.value.reason == ("size" if size < len(raw) else "digest")
        assert home.objects.has(digest) == known
    assert not unfinished(home)


def test_an_aborted_sink_leaves_nothing(home: Home) -> None:
    sink = home.objects.sink(ABSENT, 100)
    sink.write(b"half")
    assert unfinished(home)
    sink.abort()
    sink.abort()
    assert not unfinished(home)
    assert not home.objects.has(ABSENT)


def test_objects_are_listed_and_removed(home: Home) -> None:
    digests = sorted(home.objects.put(bytes([n])).digest for n in range(20))
    (home.path / "objects" / "notes.txt").write_text("not an object")
    (home.path / "objects" / digests[0][:2] / "notes.txt").write_text("nor this")
    assert list(home.objects.digests()) == digests
    for digest in digests[:10]:
        home.objects.remove(digest)
        home.objects.remove(digest)
    assert list(home.objects.digests()) == digests[10:]


def test_what_is_absent_is_said_to_be(home: Home) -> None:
    for name in map(Digest, (ABSENT, "", "../../key", ABSENT[:-1], ABSENT.upper())):
        assert not home.objects.has(name)
        assert home.objects.size(name) is None
        assert home.objects.stored(name) is None
        home.objects.remove(name)
        for get in (home.objects.load, home.objects.path, home.objects.verify, lambda n: home.objects.read(n, 0, 1)):
            with pytest.raises(NotFound):
                get(name)
    with pytest.raises(Rejected):
        home.objects.sink(Digest("../../key"), 1)


def test_a_limit_is_checked_before_reading(home: Home) -> None:
    digest = home.objects.put(b"x" * 1000).digest
    assert len(home.objects.load(digest, limit=1000)) == 1000
    with pytest.raises(Rejected) as refused:
        home.objects.load(digest, limit=999)
    assert refused.value.reason == "size"


def test_a_damaged_object_is_moved_aside_and_can_come_again(home: Home) -> None:
    digest = home.objects.put(b"weights").digest
    damage(home, digest)
    with pytest.raises(StorageError, match="damaged"):
        home.objects.load(digest)
    assert not home.objects.has(digest)
    assert (home.path / "corrupt" / digest).exists()
    sink = home.objects.sink(digest, 7)
    sink.write(b"weights")
    sink.finish()
    assert home.objects.load(digest) == b"weights"


def test_putting_the_bytes_again_mends_a_damaged_copy(home: Home) -> None:
    digest = home.objects.put(b"weights").digest
    damage(home, digest)
    home.objects.put(b"weights")
    assert home.objects.load(digest) == b"weights"


def test_an_object_may_not_be_changed_in_place(home: Home) -> None:
    digest = home.objects.put(b"weights").digest
    assert file_of(home, digest).stat().st_mode & 0o777 == 0o400


def test_bytes_are_on_the_disk_before_they_are_seen(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("fsync")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    (home.path / "objects" / canonical.digest(b"weights")[:2]).mkdir()
    home.objects.put(b"weights")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_sweep_spares_living_writers(home: Home) -> None:
    (home.path / "scratch" / "left-by-a-dead-process").write_bytes(b"half")
    sink = home.objects.sink(canonical.digest(b"whole"), 5)
    sink.write(b"who")
    assert home.objects.sweep() == 1
    other = Home.open(home.path)
    assert other.objects.sweep() == 0
    sink.write(b"le")
    sink.finish()
    assert home.objects.load(canonical.digest(b"whole")) == b"whole"
