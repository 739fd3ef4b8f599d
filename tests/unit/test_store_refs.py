"""Refs: compare-and-swap against a plain dictionary, the log, names, and many processes at once."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import EllipsisType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pmodel.domain.errors import Busy, InvalidInput, StorageError
from p2pmodel.store.home import Home

NAMES = st.sampled_from(["a", "a/b", "a/b/c", "models/x/head", "models/x/round", "d"])
VALUES = st.sampled_from(["one", "two", "three words here"])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home.open(tmp_path / "home")
    yield home
    home.close()


class RefsAreADictionary(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.home = Home.open(Path(self.folder.name))
        self.values: dict[str, str] = {}
        self.logs: dict[str, list[tuple[str | None, str]]] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(name=NAMES, value=VALUES, expected=st.one_of(st.just(...), st.none(), VALUES))
    def set(self, name: str, value: str, expected: str | EllipsisType | None) -> None:
        old = self.values.get(name)
        if expected is not ... and expected != old:
            with pytest.raises(Busy):
                self.home.refs.set(name, value, expected)
        elif old is None and any(n.startswith(name + "/") or name.startswith(n + "/") for n in self.values):
            with pytest.raises(InvalidInput):
                self.home.refs.set(name, value, expected)
        else:
            self.home.refs.set(name, value, expected)
            self.values[name] = value
            if old != value:
                self.logs.setdefault(name, []).append((old, value))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        self.home.refs.delete(name)
        self.values.pop(name, None)
        self.logs.pop(name, None)

    @rule()
    def open_again(self) -> None:
        self.home = Home.open(self.home.path)

    @invariant()
    def is_the_same(self) -> None:
        assert self.home.refs.names() == sorted(self.values)
        assert self.home.refs.names("models/") == sorted(n for n in self.values if n.startswith("models/"))
        for name in ("a", "a/b", "a/b/c", "models/x/head", "models/x/round", "d"):
            assert self.home.refs.get(name) == self.values.get(name)
            assert [(c.old, c.new) for c in self.home.refs.log(name)] == self.logs.get(name, [])


TestRefsAreADictionary = RefsAreADictionary.TestCase
TestRefsAreADictionary.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "..",
        "a/../b",
        ".hidden",
        "a/.b",
        "a b",
        "a\nb",
        "a\x00",
        "é",
        "a/" * 8 + "a",
        "x" * 129,
        "/".join(["x" * 60] * 4),
    ],
)
def test_a_name_that_could_escape_is_refused(home: Home, name: str) -> None:
    for use in (home.refs.get, home.refs.delete, home.refs.log, lambda n: home.refs.set(n, "value")):
        with pytest.raises(InvalidInput):
            use(name)


@pytest.mark.parametrize("value", ["", "two\nlines", "\x00", "x" * 4097, "\udc80"])
def test_a_value_is_one_line(home: Home, value: str) -> None:
    with pytest.raises(InvalidInput):
        home.refs.set("a", value)
    assert home.refs.get("a") is None
    assert home.refs.log("a") == []


def test_the_log_tells_times_and_hides_what_never_happened(home: Home) -> None:
    home.refs.set("a", "one")
    home.refs.set("a", "two", "one")
    log = home.path / "logs" / "a"
    with log.open("a") as file:
        file.write(json.dumps([0.0, "two", "never"]) + "\n" + '[1.0, "two", "to')  # killed, then torn by a power cut
    assert [(c.old, c.new) for c in home.refs.log("a")] == [(None, "one"), ("one", "two")]
    home.refs.set("a", "three")
    changes = home.refs.log("a")
    assert [(c.old, c.new) for c in changes] == [(None, "one"), ("one", "two"), ("two", "three")]
    assert changes[0].time <= changes[1].time <= changes[2].time


def test_folders_that_a_killed_process_left_give_way(home: Home) -> None:
    (home.path / "refs" / "a" / "b" / "c").mkdir(parents=True)
    home.refs.set("a", "value")
    assert home.refs.get("a") == "value"


def test_a_damaged_ref_is_said_to_be(home: Home) -> None:
    (home.path / "refs" / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(StorageError, match="damaged"):
        home.refs.get("a")


COUNT = """
import sys
from pathlib import Path
from types import EllipsisType
from p2pmodel.domain.errors import Busy
from p2pmodel.store.home import Home
refs = Home.open(Path(sys.argv[1])).refs
done = 0
while done < 20:
    old = refs.get("counter")
    try:
        refs.set("counter", str(int(old or 0) + 1), old)
        done += 1
    except Busy:
        pass
"""


def test_no_change_is_lost_between_processes_and_threads(home: Home) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(home.path)]) for _ in range(3)]

    def count() -> None:
        done = 0
        while done < 20:
            old = home.refs.get("counter")
            try:
                home.refs.set("counter", str(int(old or 0) + 1), old)
                done += 1
            except Busy:
                pass

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(count) for _ in range(2)]:
            future.result()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert home.refs.get("counter") == "100"
    assert [change.new for change in home.refs.log("counter")] == [str(n) for n in range(1, 101)]
