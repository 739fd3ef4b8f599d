"""Types the tutorial into shells, from its first line to its last, and compares what comes out with what it says."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.documents import DOCS, ELLIPSIS, Block, blocks

pytestmark = pytest.mark.timeout(600)

PAGE_PORT = "7000"
STEP_SECONDS = 240.0
STAYS = re.compile(r"p2pmodel (join|serve)\b")
END = "tutorial-command-ended-with"
ENDED = re.compile(rf"^{END} (\d+)\n", re.MULTILINE)


class Shell:
    """A bash of its own, as one of the reader's terminals is; `text` is all that came out of it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.text, self.seen = "", 0
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self.text += line
                self._changed.notify_all()

    def type(self, command: str, shown: str) -> None:
        """Runs it, and waits for what the page shows, and for its end unless it stays."""
        assert self.process.stdin
        stays = STAYS.search(command)
        self.process.stdin.write(f"{{ {command}\n}} </dev/null\necho {END} $?\n")
        self.process.stdin.flush()
        if stays:
            return self.wait(shown)
        out = self.wait_for_end()
        assert pattern(shown).search(out), f"`{command}` printed\n{out}\nbut the page says\n{shown}"

    def wait(self, shown: str) -> None:
        """For what something that stays shows."""
        wanted = pattern(shown)
        found = self._until(re.compile(f"{wanted.pattern}|{ENDED.pattern}", re.MULTILINE))
        assert wanted.match(found[0]), f"it ended, and printed\n{self.text[self.seen :]}\nbut the page says\n{shown}"
        self.seen = found.end()

    def wait_for_end(self) -> str:
        """What it printed before."""
        end = self._until(ENDED)
        out, self.seen = self.text[self.seen : end.start()], end.end()
        assert end[1] == "0", f"it ended with status {end[1]}:\n{out}"
        return out

    def interrupt(self) -> None:
        """Ctrl-C."""
        for child in psutil.Process(self.process.pid).children():
            child.send_signal(signal.SIGINT)

    def _until(self, wanted: re.Pattern[str]) -> re.Match[str]:
        deadline = time.monotonic() + STEP_SECONDS
        with self._changed:
            while not (found := wanted.search(self.text, self.seen)):
                left = deadline - time.monotonic()
                assert left > 0, f"it printed\n{self.text[self.seen :]}\nand not\n{wanted.pattern}"
                self._changed.wait(left)
        return found

    def close(self) -> None:
        """Ends it and whatever it started; nodes have a moment to leave."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        for child in children:
            child.terminate()
        for child in psutil.wait_procs(children, 20)[1]:
            child.kill()
        self.process.kill()
        self.process.wait()


def pattern(shown: str) -> re.Pattern[str]:
    """Of consecutive lines, in which … stands for anything within a line, or alone, for any lines."""
    lines = [
        r"(?:.*\n)*?" if line == ELLIPSIS else ".*?".join(map(re.escape, line.split(ELLIPSIS))) + r"[ \t]*\n"
        for line in shown.splitlines()
    ]
    return re.compile("^" + "".join(lines), re.MULTILINE)


def fill_in(command: str, printed: str) -> str:
    """What the reader is told to paste: the last that was printed like it."""

    def last(match: re.Match[str]) -> str:
        like = r"[^\s'\"]+".join(map(re.escape, match[0].split(ELLIPSIS)))
        return str(re.findall(like, printed)[-1])

    return re.sub(rf"[^\s'\"]*{ELLIPSIS}[^\s'\"]*", last, command)


def steps(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what it shows); the command is empty where the block begins with what is shown."""
    command, shown = "", ""
    for line in block.text.splitlines():
        if line.startswith(("$ ", "^C")):
            if command or shown:
                yield command, shown
            command, shown = line.removeprefix("$ "), ""
        elif line.startswith("> "):
            command += "\n" + line[2:]
        else:
            shown += line + "\n"
    yield command, shown


def free_ports() -> str:
    """The first of two free ones that follow each other."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return str(port)
            except (OSError, OverflowError):
                continue


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    assert shutil.which("bash"), "the tutorial is for bash"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("P2PMODEL_")}
    path = os.pathsep.join((sysconfig.get_path("scripts"), str(Path(sys.executable).parent), environment["PATH"]))
    environment |= {"HOME": str(tmp_path), "PATH": path, "OMP_NUM_THREADS": "1"}
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8").replace(PAGE_PORT, free_ports())
    page = [block for block in blocks(text) if block.language == "console"]
    assert page
    assert all(block.title for block in page), "each block has to say whose terminal it is"
    shells: dict[str, Shell] = {}
    try:
        for block in page:
            if block.title not in shells:
                where = tmp_path / "tutorial" if shells else tmp_path
                shells[block.title] = Shell(where, environment)
            shell = shells[block.title]
            for command, shown in steps(block):
                if command == "^C":
                    shell.interrupt()
                    assert pattern(shown).search(shell.wait_for_end()), f"it should have printed {shown}"
                elif not command:
                    shell.wait(shown)
                else:
                    printed = "".join(other.text for other in shells.values())
                    shell.type(fill_in(command, printed), shown)
    finally:
        for shell in shells.values():
            shell.close()
