"""`p2pmodel join` in a terminal: its panel, its end, and logs for programs beside it; and what a shell completes."""

import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

SECONDS = 90.0
PROGRAM = Path(sysconfig.get_path("scripts")) / "p2pmodel"


def read_until(master: int, wanted: str, text: str = "") -> str:
    """What was written to the terminal, without colours."""
    deadline = time.monotonic() + SECONDS
    while wanted not in text:
        left = deadline - time.monotonic()
        assert left > 0, f"no {wanted!r} in {text[-2000:]}"
        if select.select([master], [], [], left)[0]:
            text += re.sub(r"\x1b\[[0-9;]*m", "", os.read(master, 65536).decode(errors="replace"))
    return text


def test_a_node_on_a_terminal_shows_a_panel_and_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    master, slave = os.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [
        sys.executable,
        "-m",
        "p2pmodel",
        "--log-level",
        "INFO",
        "--log-format",
        "json",
        "join",
        "--layers",
        "0:2",
    ]
    environment = {**os.environ, "TERM": "xterm-256color", "P2PMODEL_HOME": str(tmp_path / "home")}
    with (tmp_path / "log").open("wb") as log:
        node = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=log, env=environment)
    os.close(slave)
    try:
        text = read_until(master, "Ctrl-C leaves")
        assert text.index("serving layers 0:2") < text.index("╭─ starter 1.0.0")
        assert "layers 0:2 of 6 in fp32" in text
        assert "4 layers are served by nobody" in text
        node.send_signal(signal.SIGINT)
        text = read_until(master, "\x1b[?25h", text)  # the cursor is back
        assert "leaving" in text
        assert node.wait(30) == 0
        assert "Traceback" not in text
    finally:
        node.kill()
        node.wait()
        os.close(master)
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= one.keys() for one in said)


def test_an_error_is_json_too_where_logs_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "p2pmodel", "--log-format", "json", "status", "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["level"] == "ERROR"


def completed(*words: str) -> list[str]:
    """As bash offers it when Tab is pressed behind the last word."""
    script = f"""
        source <({PROGRAM} --show-completion bash)
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        $(complete -p p2pmodel | sed 's/.*-F \\([^ ]*\\).*/\\1/') p2pmodel
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}", "SHELL": "/bin/bash"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes_commands_and_options() -> None:
    assert completed("p2pmodel", "jo") == ["join"]
    assert completed("p2pmodel", "patch", "pu") == ["publish"]
    assert completed("p2pmodel", "join", "--cache") == ["--cache-memory"]
