"""A crash of native code."""

import signal
import subprocess
import sys
from pathlib import Path

CRASHING = """
import ctypes
from p2pmodel.cli import app

def read_nowhere():
    ctypes.string_at(0)

app.app = read_nowhere
app.main()
"""


def test_a_crash_says_on_stderr_where_it_was(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHING], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "in read_nowhere" in done.stderr
