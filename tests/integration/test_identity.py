"""`p2pmodel id` and `p2pmodel swarm-key`: keys that move, by the commands that people use."""

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pmodel.cli.app import app
from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, P2PModelError, UsageError
from p2pmodel.store.home import Home
from p2pmodel.wire import sealed_key
from p2pmodel.wire.signing import Key

WORDS = "correct horse battery staple"


def run(*arguments: str | Path) -> str:
    """What the command prints. Raises what it raises."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, P2PModelError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_key.seal, "__defaults__", (1 << 10,))


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "words"
    file.write_text(WORDS + "\nnot this line\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def exported(tmp_path: Path, words: Path) -> tuple[Path, str]:
    """The file, and the peer in it."""
    home, file = tmp_path / "old", tmp_path / "me.identity"
    peer = json.loads(run("id", "show", "--home", home, "--json"))["peer"]
    assert peer in run("id", "export", file, "--home", home, "--passphrase-file", words)
    return file, peer


def test_a_key_moves_to_another_home(tmp_path: Path, exported: tuple[Path, str], words: Path) -> None:
    file, peer = exported
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = (tmp_path / "old" / "key").read_bytes()
    assert not any(part in file.read_bytes() for part in (key[4:36], key[4:36].hex().encode()))
    assert peer in run("id", "import", file, "--home", tmp_path / "new", "--passphrase-file", words)
    assert (tmp_path / "new" / "key").read_bytes() == key
    assert stat.S_IMODE((tmp_path / "new" / "key").stat().st_mode) == 0o600
    run("id", "import", file, "--home", tmp_path / "new", "--passphrase-file", words)
    with pytest.raises(UsageError, match="there already"):
        run("id", "export", file, "--home", tmp_path / "new", "--passphrase-file", words)


def test_a_key_that_is_there_stays_unless_it_is_replaced_and_then_it_is_kept(
    tmp_path: Path, exported: tuple[Path, str], words: Path
) -> None:
    file, peer = exported
    home = Home.open(tmp_path / "other")
    theirs, before = home.key.peer, home.key_path.read_bytes()
    command = ("id", "import", file, "--home", home.path, "--passphrase-file", words)
    with pytest.raises(UsageError, match=theirs):
        run(*command)
    assert home.key_path.read_bytes() == before
    done = json.loads(run(*command, "--force", "--json"))
    assert done["peer"] == peer
    assert Path(done["replaced"]).read_bytes() == before
    assert Home.open(home.path).key.peer == peer


def test_no_key_is_taken_from_under_a_running_node(tmp_path: Path, exported: tuple[Path, str], words: Path) -> None:
    home = Home.open(tmp_path / "new")
    with home.lock(), pytest.raises(Busy, match="Another node runs"):
        run("id", "import", exported[0], "--home", home.path, "--passphrase-file", words)
    assert not home.key_path.exists()


def test_wrong_words_and_changed_files_open_nothing(tmp_path: Path, exported: tuple[Path, str], words: Path) -> None:
    file, _ = exported
    text = file.read_text()
    command = ("id", "import", file, "--home", tmp_path / "new", "--passphrase-file", words)
    fields = json.loads(text)
    stranger = Key.generate().peer
    for name, value in (
        ("peer", stranger), ("sealed", fields["nonce"]), ("scrypt_n", 512), ("scrypt_n", 1 << 40), ("scrypt_n", 1000),
        ("nonce", ""), ("format", "p2pmodel-identity/2"), ("scrypt_salt", fields["nonce"]),
    ):  # fmt: skip
        file.write_text(json.dumps({**fields, name: value}))
        with pytest.raises(InvalidInput):
            run(*command)
    for raw in (b"", b"{}", b"\xff" * 10, text.encode() + b" " * 5000):
        file.write_bytes(raw)
        with pytest.raises(InvalidInput, match="no exported identity"):
            run(*command)
    file.write_text(text)
    words.write_text("something else entirely")
    with pytest.raises(InvalidInput, match="does not open"):
        run(*command)
    assert not (tmp_path / "new" / "key").exists()


def test_passphrases_are_kept_well(tmp_path: Path, exported: tuple[Path, str], words: Path) -> None:
    export = ("id", "export", tmp_path / "again", "--home", tmp_path / "old")
    with pytest.raises(UsageError, match="--passphrase-file"):
        run(*export)
    with pytest.raises(NotFound):
        run(*export, "--passphrase-file", tmp_path / "nowhere")
    for text in ("short", "", "\n" + WORDS):
        words.write_text(text)
        with pytest.raises(InvalidInput, match="passphrase"):
            run(*export, "--passphrase-file", words)
    words.write_text(WORDS)
    words.chmod(0o644)
    with pytest.raises(InvalidInput, match="other users"):
        run(*export, "--passphrase-file", words)
    with pytest.raises(NotFound):
        run("id", "export", tmp_path / "again", "--home", tmp_path / "empty", "--passphrase-file", words)
    assert not (tmp_path / "again").exists()


def test_on_a_terminal_it_asks_twice_and_shows_nothing(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    peer, file = home.key.peer, tmp_path / "me.identity"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "p2pmodel", "id", "export", str(file), "--home", str(home.path)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as asked:
        os.close(theirs)
        shown = b""
        for prompt in (b"Passphrase: ", b"confirmation: "):
            while not shown.endswith(prompt):
                shown += os.read(ours, 1024)
            os.write(ours, WORDS.encode() + b"\n")
        while True:
            try:
                shown += os.read(ours, 1024)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert asked.returncode == 0, shown
    assert WORDS.encode() not in shown
    assert sealed_key.unseal(sealed_key.read(file.read_bytes(), "file"), WORDS, "file").peer == peer


def test_a_swarm_key_is_made_once_and_shown_by_its_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "swarm.key"
    made = json.loads(run("swarm-key", "new", file, "--json"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(run("swarm-key", "show", "--swarm-key", file, "--json"))["fingerprint"] == made["fingerprint"]
    assert file.read_text().split()[-1] not in run("swarm-key", "show", "--swarm-key", file)
    with pytest.raises(UsageError):
        run("swarm-key", "new", file)
    with pytest.raises(NotFound):
        run("swarm-key", "show")
