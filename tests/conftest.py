"""What holds for every test: no network beyond this machine, no state of the user's, one thread a process."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch, transformers or a child process looks.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("P2PMODEL_") and name != "P2PMODEL_VENV"]:
    del os.environ[name]

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no defect: examples have no deadline of their own, the test has its timeout.
settings.register_profile("p2pmodel", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("p2pmodel")


@pytest.fixture(autouse=True)
def home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command that is given no home keeps its things: never the user's."""
    home = tmp_path / "default-home"
    monkeypatch.setenv("P2PMODEL_HOME", str(home))
    return home
