"""The home: where it is, who may have it, its key, lock, socket and configuration, and what a bad disk says."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, StorageError
from p2pmodel.store.home import Home
from p2pmodel.wire.signing import Key


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home.open(tmp_path / "home")
    yield home
    home.close()


def test_folders_are_private(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "a" / "b")
    for folder in (tmp_path / "a", home.path, *(p for p in home.path.iterdir() if p.is_dir())):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("P2PMODEL_HOME", raising=False)
    assert Home.open().path == (tmp_path / "data" / "p2pmodel").resolve()
    monkeypatch.setenv("P2PMODEL_HOME", str(tmp_path / "mine"))
    assert Home.open().path == (tmp_path / "mine").resolve()
    assert Home.open(tmp_path / "this").path == (tmp_path / "this").resolve()


def test_a_home_is_not_made_where_it_should_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Home.open(tmp_path, create=False)
    assert list(tmp_path.iterdir()) == []
    Home.open(tmp_path)
    assert Home.open(tmp_path, create=False).path == tmp_path.resolve()


@pytest.mark.parametrize("path", ["file", "file/below", "home-with-file", "/proc/p2pmodel", "/sys/p2pmodel", "x" * 300])
def test_a_home_that_cannot_be_is_one_sentence(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "home-with-file").mkdir()
    (tmp_path / "home-with-file" / "objects").write_text("a file")
    with pytest.raises(StorageError) as failed:
        Home.open(tmp_path / path)
    assert failed.value.message.endswith(".")
    assert "\n" not in failed.value.message
    assert "--home" in failed.value.hint


def test_a_read_only_home_is_said_to_be() -> None:
    read_only = [
        line.split()[1]
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[3].split(",")[0] == "ro" and Path(line.split()[1]).is_dir()
    ]
    if not read_only:
        pytest.skip("nothing is mounted read-only here")
    with pytest.raises(StorageError, match="read-only"):
        Home.open(Path(read_only[0]) / "p2pmodel")


def test_the_key_stays(home: Home) -> None:
    assert not home.key_path.exists()
    key = home.key
    assert home.key is key
    assert Home.open(home.path).key.peer == key.peer
    assert Key.from_libp2p(home.key_path.read_bytes()).peer == key.peer
    assert home.key_path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(home.path / "scratch") == []


def test_processes_agree_on_one_key(home: Home) -> None:
    code = "import sys, pathlib, p2pmodel.store.home as s; print(s.Home.open(pathlib.Path(sys.argv[1])).key.peer)"
    command = [sys.executable, "-c", code, str(home.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate(timeout=60)[0].strip() for process in processes} == {home.key.peer}


def test_a_damaged_key_is_never_replaced(home: Home) -> None:
    home.key_path.write_bytes(b"damaged")
    with pytest.raises(StorageError):
        _ = home.key
    assert home.key_path.read_bytes() == b"damaged"


HOLD = """
import os, sys
from pathlib import Path
from p2pmodel.store.home import Home
lock = Home.open(Path(sys.argv[1])).lock()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_one_node_a_home(home: Home) -> None:
    with home.lock() as lock:
        with pytest.raises(Busy, match=f"process {os.getpid()}"):
            home.lock()
        lock.release()
        home.lock().release()
    home.lock().release()


def test_the_kernel_frees_the_lock_of_a_killed_node(home: Home) -> None:
    command = [sys.executable, "-c", HOLD, str(home.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as node:
        assert node.stdout is not None
        pid = int(node.stdout.readline())
        with pytest.raises(Busy) as busy:
            home.lock()
        assert str(pid) in busy.value.hint
        assert "--home" in busy.value.hint
        assert str(home.path) in busy.value.message
        os.kill(pid, signal.SIGKILL)
        node.wait()
    home.lock().release()


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
    path.unlink()


def test_the_socket_is_in_the_home() -> None:
    home = Home.open(Path("/tmp") / f"p2pmodel-test-{os.getpid()}")
    try:
        assert home.control_socket == home.path / "control.sock"
        listen(home.control_socket)
    finally:
        shutil.rmtree(home.path)


def test_the_socket_of_a_long_path_is_elsewhere_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home.open(tmp_path / ("long" * 30))
    path = home.control_socket
    assert len(os.fsencode(path)) <= 100
    assert path.parent != home.path
    assert path.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Home.open(Path("long" * 30)).control_socket == path != Home.open(tmp_path / ("gnol" * 30)).control_socket
    listen(path)


def test_settings(home: Home) -> None:
    assert home.settings() == {}
    (home.path / "config.toml").write_text("[gateway]\nport = 8080\n", newline="\r\n")
    assert home.settings() == {"gateway": {"port": 8080}}


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"a = 1\nb = \n", 2),
        (b"a = 1\n\nb = [1,\n", 4),
        (b"a = 1\na = 2", 2),
        (b"a = 1\nb = '\xff'\n", 2),
        (b'a = "', 1),
    ],
)
def test_malformed_settings_name_file_and_line(home: Home, raw: bytes, line: int) -> None:
    path = home.path / "config.toml"
    path.write_bytes(raw)
    with pytest.raises(InvalidInput) as wrong:
        home.settings()
    assert f"Line {line} of {path}" in wrong.value.message


def test_settings_that_are_a_folder(home: Home) -> None:
    (home.path / "config.toml").mkdir()
    with pytest.raises(StorageError):
        home.settings()
