"""kill -9 before every step of a write, and at random moments; and a disk that fills up. The home always opens."""

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2pmodel.domain.errors import StorageError
from p2pmodel.domain.model import BlobRef
from p2pmodel.store.fsck import fsck
from p2pmodel.store.home import Home
from p2pmodel.store.index import RecordRow
from p2pmodel.wire import canonical

MODEL = canonical.digest(b"model")

WRITE = """
import os, sys
from pathlib import Path
from p2pmodel.store.home import Home
from p2pmodel.store.scan import record_row
from p2pmodel.wire import canonical
from tests.support.factories import candidate

def write(home, n):
    blob = b"%d " % n * 5000
    sink = home.objects.sink(canonical.digest(blob), len(blob))
    sink.write(blob[:7000])
    sink.write(blob[7000:])
    sink.finish()
    record = home.key.sign("candidate", candidate(round=n))
    home.index.add(record_row(record, float(n)) if home.objects.put(record) else None)
    home.refs.set("head", f"{n} {canonical.digest(record)}")
    home.refs.set(f"rounds/{n}", canonical.digest(blob), None)
    home.refs.delete(f"rounds/{n - 1}")
    print(n, flush=True)
"""

FOREVER = (
    WRITE
    + """
home = Home.open(Path(sys.argv[1]))
n = int(sys.argv[2])
while True:
    n += 1
    write(home, n)
"""
)

EVERY_STEP = (
    WRITE
    + """
import signal
STEPS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "fchmod", "ftruncate")
kill_at = 0

def counted(name):
    original = getattr(os, name)
    def call(*arguments, **options):
        global kill_at
        kill_at -= 1
        if kill_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(os, name, call)

for name in STEPS:
    counted(name)

for point in range(1, 1000):
    child = os.fork()
    if child == 0:
        kill_at = point
        write(Home.open(Path(sys.argv[1])), point)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    kill_at = 0
    home = Home.open(Path(sys.argv[1]))
    assert home.objects.sweep() == 0 and os.listdir(home.path / "scratch") == []
    home.lock().release()
    home.close()
"""
)


def run(code: str, *arguments: object, prepare: Callable[[], None] | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=prepare,
    )


def demand_whole(path: Path, acknowledged: int) -> None:
    """Everything opens, nothing is damaged, nothing that was acknowledged is missing, and the log is a chain."""
    home = Home.open(path)
    rounds = [row.round for row in home.index.records(MODEL, "candidate")]
    report = fsck(home)
    assert report.corrupt == ()
    assert report.dangling_refs == ()
    assert os.listdir(home.path / "scratch") == []
    assert [row.round for row in home.index.records(MODEL, "candidate")][: len(rounds)] == rounds
    head = (home.refs.get("head") or "0").split()
    assert int(head[0]) >= acknowledged
    if acknowledged:
        assert acknowledged in rounds
        assert home.objects.has(canonical.digest(b"%d " % acknowledged * 5000))
    changes = home.refs.log("head")
    assert not changes or changes[-1].new == home.refs.get("head")
    assert [change.old for change in changes[1:]] == [change.new for change in changes[:-1]]
    home.close()


def test_killed_before_every_step_of_a_write(tmp_path: Path) -> None:
    process = run(EVERY_STEP, tmp_path / "home")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    last = int(said.split()[-1])
    assert last > 40, "the steps were not counted"
    demand_whole(tmp_path / "home", last)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(1)
    acknowledged = 0
    for _ in range(4):
        process = run(FOREVER, tmp_path / "home", acknowledged + 1000)
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 12)):
            acknowledged = int(process.stdout.readline())
        for _ in range(chance.randrange(20_000)):  # a moment inside the next write
            pass
        process.kill()
        acknowledged = max([acknowledged, *(int(line) for line in process.stdout if line.endswith("\n"))])
        process.wait()
        process.stdout.close()
        demand_whole(tmp_path / "home", acknowledged)


def test_two_writers_one_of_them_killed(tmp_path: Path) -> None:
    Home.open(tmp_path / "home")
    survivor, victim = run(FOREVER, tmp_path / "home", 0), run(FOREVER, tmp_path / "home", 1_000_000)
    assert survivor.stdout is not None
    assert victim.stdout is not None
    for _ in range(3):
        survivor.stdout.readline()
        victim.stdout.readline()
    victim.kill()
    victim.wait()
    for _ in range(5):
        assert survivor.stdout.readline()
    survivor.kill()
    survivor.wait()
    survivor.stdout.close()
    victim.stdout.close()
    assert fsck(Home.open(tmp_path / "home")).corrupt == ()


FULL = """
import sys
from pathlib import Path
from p2pmodel.domain.errors import StorageError
from p2pmodel.domain.model import BlobRef
from p2pmodel.store.home import Home
from p2pmodel.wire import canonical
home = Home.open(Path(sys.argv[1]))
raw = b"x" * 300_000
def sink():
    sink = home.objects.sink(canonical.digest(raw), len(raw))
    for at in range(0, len(raw), 10_000):
        sink.write(raw[at:at + 10_000])
    sink.finish()
for write in (lambda: home.objects.put(raw), sink):
    try:
        write()
    except StorageError as error:
        print(error.message)
    else:
        sys.exit("it was written")
"""


def test_a_file_over_the_limit_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    Home.open(tmp_path)
    limit = 200_000
    process = run(FULL, tmp_path, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    said = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert len(said) == 2
    assert all("limit on the size of files" in line for line in said)
    home = Home.open(tmp_path)
    assert os.listdir(home.path / "scratch") == []
    assert list(home.objects.digests()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB, where this user may mount."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_one_sentence_and_what_was_there_stays(small_disk: Path) -> None:
    home = Home.open(small_disk)
    kept = home.objects.put(b"kept")
    home.refs.set("head", kept.digest)
    (small_disk / "ballast").write_bytes(bytes(150_000))
    with pytest.raises(StorageError, match="full"):
        home.objects.put(b"x" * 200_000)
    fill(small_disk / "more-ballast")
    rows = [RecordRow("patch", MODEL, BlobRef(canonical.digest(b"%d" % n), 1), 0, 1.0) for n in range(1000)]
    for write in (
        lambda: home.objects.put(b"y" * 5000),
        lambda: home.refs.set("head", "other" * 800),
        lambda: [home.index.add(row) for row in rows],
    ):
        with pytest.raises(StorageError):
            write()
    home.close()
    again = Home.open(small_disk)
    assert again.refs.get("head") == kept.digest
    assert again.objects.load(kept.digest) == b"kept"
    assert os.listdir(small_disk / "scratch") == []
    (small_disk / "ballast").unlink()
    assert fsck(again).corrupt == ()
    assert again.index.add(rows[-1])
    again.refs.set("head", "moved on")
    again.close()


def test_a_disk_mounted_read_only_is_one_sentence(small_disk: Path) -> None:
    home = Home.open(small_disk)
    home.objects.put(b"kept")
    home.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="read-only"):
        Home.open(small_disk)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
