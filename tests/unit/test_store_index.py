"""The index: what it answers, and that it comes back from the objects whatever becomes of its file."""

import dataclasses
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pmodel.domain.errors import Rejected, StorageError
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.version import Verdict
from p2pmodel.store.fsck import fsck
from p2pmodel.store.home import Home
from p2pmodel.store.index import RecordRow
from p2pmodel.store.scan import record_row
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from tests.support.factories import blob, candidate, manifest, patch

KEY = Key.generate()
MODEL = canonical.digest(b"model")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home.open(tmp_path / "home")
    yield home
    home.close()


def row(n: int = 0, kind: str = "patch", model: ModelId = MODEL, seen: float = 1.0, round: int = 0) -> RecordRow:
    return RecordRow(kind, model, blob(b"%d" % n), round, seen)


def lineage(home: Home) -> list[RecordRow]:
    """One signed record of each kind, in the store, with its row."""
    verdict = Verdict(KEY.peer, MODEL, 3, records.version_id(candidate(round=3)), True, "", ())
    signed = (
        KEY.sign("manifest", manifest(KEY)),
        KEY.sign("patch", patch(KEY)),
        KEY.sign("candidate", candidate(round=3)),
        KEY.sign("verdict", verdict),
    )
    for record in signed:
        home.objects.put(record)
    return [record_row(record, home.objects.stored(canonical.digest(record)) or 0.0) for record in signed]


def everything(home: Home) -> set[RecordRow]:
    return set(home.index.find(""))


rows = st.builds(
    row,
    n=st.integers(0, 30),
    kind=st.sampled_from(["manifest", "patch", "verdict"]),
    model=st.sampled_from([MODEL, canonical.digest(b"other")]),
    seen=st.floats(0, 1e9),
    round=st.integers(0, 2**63 - 1),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(added=st.lists(rows, max_size=20), prefix=st.text("0123456789abcdef", max_size=2))
def test_it_answers_like_a_list(home: Home, added: list[RecordRow], prefix: str) -> None:
    home.index.rebuild(lambda: [])
    known: dict[str, RecordRow] = {}
    for new in added:
        assert home.index.add(new) == (new.record.digest not in known)
        known.setdefault(new.record.digest, new)
    ordered = sorted(known.values(), key=lambda r: (r.seen, r.record.digest))
    assert home.index.records(MODEL) == [r for r in ordered if r.model == MODEL]
    assert home.index.records(MODEL, "patch") == [r for r in ordered if r.model == MODEL and r.kind == "patch"]
    first_seen = sorted({(min(r.seen for r in ordered if r.model == one.model), one.model) for one in ordered})
    assert home.index.models() == [model for _, model in first_seen]
    found = home.index.find(prefix.upper())
    assert found == sorted((r for r in ordered if r.record.digest.startswith(prefix)), key=lambda r: r.record.digest)


def test_a_prefix_that_is_no_prefix_finds_nothing(home: Home) -> None:
    home.index.add(row())
    assert home.index.find(row().record.digest) == [row()]
    for prefix in ("%", "_", "0x", "' OR 1", "é", "a" * 65):
        assert home.index.find(prefix) == []


def test_rows_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="round"):
        row(round=2**63)
    with pytest.raises(ValueError, match="finite"):
        row(seen=float("nan"))
    late = candidate()
    object.__setattr__(late, "round", 2**64 - 1)
    with pytest.raises(Rejected):
        record_row(KEY.sign("candidate", late), 0.0)
    for raw in (b"", b"\x84\xa4body", KEY.sign("lease", "x"), KEY.sign("patch", patch(Key.generate()))):
        with pytest.raises(Rejected):
            record_row(raw, 0.0)


def test_rows_tell_model_and_round_of_each_kind(home: Home) -> None:
    made = lineage(home)
    assert [(r.kind, r.model, r.round) for r in made] == [
        ("manifest", made[0].record.digest, 0),
        ("patch", MODEL, 0),
        ("candidate", MODEL, 3),
        ("verdict", MODEL, 3),
    ]


def test_a_deleted_index_comes_back_from_the_objects(home: Home) -> None:
    made = lineage(home)
    home.objects.put(b"a blob that is no record")
    home.objects.put(b"\x84\xa4body that only looks like one")
    home.close()
    (home.path / "index.sqlite").unlink()
    assert everything(Home.open(home.path)) == set(made)


def test_deleting_it_under_a_running_process_loses_nothing(home: Home) -> None:
    home.index.add(row())
    made = lineage(home)
    for file in home.path.glob("index.sqlite*"):
        file.unlink()
    assert everything(home) == set(made)
    assert home.index.add(row())


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "page", "zeros"])
def test_a_damaged_index_is_made_again(home: Home, damage: str) -> None:
    made = lineage(home)
    for one in (*made, *(row(n) for n in range(200))):
        home.index.add(one)
    home.close()
    path = home.path / "index.sqlite"
    raw = path.read_bytes()
    damaged = {
        "garbage": b"not a database at all" * 500,
        "empty": b"",
        "cut": raw[:5000],
        "zeros": bytes(len(raw)),
        "page": raw[:4096] + b"\xff" * (len(raw) - 4096),
    }
    path.write_bytes(damaged[damage])
    again = Home.open(home.path)
    assert again.index.records(MODEL, "verdict") == [made[3]]
    assert set(made) <= everything(again)
    assert again.index.add(row(1000))


def test_damage_under_a_running_process_is_mended(home: Home) -> None:
    made = lineage(home)
    for one in made:
        home.index.add(one)
    other = Home.open(home.path)
    assert everything(other) == set(made)
    for file in home.path.glob("index.sqlite*"):
        file.write_bytes(b"garbage" * 2000)
    for user in (home, other, home):
        user.close()
        assert everything(user) == set(made)


def test_a_newer_index_is_left_alone(home: Home) -> None:
    home.index.models()
    home.close()
    sql = sqlite3.connect(home.path / "index.sqlite")
    sql.execute("PRAGMA user_version = 99")
    sql.close()
    with pytest.raises(StorageError, match="newer"):
        Home.open(home.path).index.models()


def test_fsck_finds_what_is_wrong_and_mends_what_it_can(home: Home) -> None:
    made = lineage(home)
    good, bad = home.objects.put(b"good"), home.objects.put(b"bad")
    for one in made:
        home.index.add(dataclasses.replace(one, seen=7.0))
    home.index.add(row())
    version = records.version_id(candidate(round=3))
    for name, value in (
        ("object", good.digest),
        ("version", version),
        ("text", "no digest"),
        ("lost", MODEL),
        ("damaged", f"{good.digest} {bad.digest}"),
    ):
        home.refs.set(name, value)
    (home.path / "refs" / "garbage").write_bytes(b"\xff")
    (home.path / "scratch" / "left").write_bytes(b"half")
    path = home.objects.path(bad.digest)
    path.chmod(0o600)
    path.write_bytes(b"rot")

    report = fsck(home)
    assert (report.objects, report.bytes) == (5, 4 + sum(one.record.size for one in made))
    assert report.corrupt == (bad.digest,)
    assert not home.objects.has(bad.digest)
    assert report.dangling_refs == ("damaged", "garbage", "lost")
    assert (report.records, report.swept) == (4, 1)
    assert everything(home) == {dataclasses.replace(one, seen=7.0) for one in made}
    assert fsck(home).corrupt == ()


def test_fsck_mends_an_index_that_says_something_else(home: Home) -> None:
    made = lineage(home)
    for one in made:
        home.index.add(dataclasses.replace(one, kind="patch", round=99))
    fsck(home)
    assert everything(home) == set(made)


def test_what_comes_while_the_index_is_rebuilt_stays(home: Home) -> None:
    made = lineage(home)
    other = Home.open(home.path)

    def source() -> Iterator[RecordRow]:
        yield made[0]
        assert other.index.add(row())

    assert home.index.rebuild(source) == 2
    assert everything(home) == {made[0], row()}


ADD = """
import sys
from pathlib import Path
from p2pmodel.domain.model import BlobRef
from p2pmodel.store.home import Home
from p2pmodel.store.index import RecordRow
from p2pmodel.wire import canonical
model = canonical.digest(b"model")
new = 0
for n in range(100):
    home = Home.open(Path(sys.argv[1]))
    new += home.index.add(RecordRow("patch", model, BlobRef(canonical.digest(b"%d" % n), 1), 0, 1.0))
    assert len(home.index.records(model)) > n
    home.close()
print(new)
"""


def test_processes_add_at_the_same_time(home: Home) -> None:
    command = [sys.executable, "-c", ADD, str(home.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    new = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sum(new) == 100 == len(home.index.records(MODEL))
