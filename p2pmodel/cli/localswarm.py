"""A swarm of real node processes on this machine: for the quickstart, for benchmarks and for tests."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from p2pmodel.control.client import ControlClient
from p2pmodel.domain.errors import P2PModelError, Unreachable

START_SECONDS = 120.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.7
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def launch(arguments: Sequence[str], log: IO[bytes], outlive: bool) -> "subprocess.Popen[str]":
    """Starts `p2pmodel ARGUMENTS` in a session of its own, with its lines in a pipe, or in the log where it outlives
    this process."""
    return subprocess.Popen(
        [sys.executable, "-m", "p2pmodel", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if not outlive else log,
        stderr=log,
        text=True,
        start_new_session=True,
        preexec_fn=None if outlive else die_with_parent,
    )


class NodeProcess:
    """One `p2pmodel join`, with its home and its log. Its lines are read as they come."""

    def __init__(self, name: str, home: Path, arguments: Sequence[str], *, outlive: bool) -> None:
        """outlive: whether the node goes on when this process ends."""
        self.name, self.home = name, home
        self.lines: list[str] = []
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "node.log"
        self._serving = threading.Event()
        with self.log.open("ab") as log:
            self.process = launch(["--log-level", "INFO", "join", "--home", str(home), *arguments], log, outlive)
        self._outlive = outlive
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_serving(self, deadline: float) -> None:
        """Raises Unreachable with the end of the node's log when it ends, or is not serving by the deadline."""
        while not self._serving.wait(0.1):
            if self.process.poll() is not None or time.monotonic() > deadline:
                what = "ended" if self.process.poll() is not None else "did not serve in time"
                raise Unreachable(f"The node {self.name} {what}: {self._tail()}", f"Its log is {self.log}")

    @property
    def address(self) -> str:
        """The multiaddr that others join with."""
        return next(line.split("--peers ")[1].strip() for line in self.lines if "--peers " in line)

    def control(self) -> ControlClient:
        return ControlClient.connect(self.home / "control.sock")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """As a power cut would: kill -9 of the node and its children."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def _read(self) -> None:
        if self.process.stdout is None:
            return self._follow()
        for line in self.process.stdout:
            self._take(line)

    def _follow(self) -> None:
        """The node outlives this process, so it writes to its log alone, and this reads there."""
        with self.log.open(encoding="utf-8") as log:
            while self.process.poll() is None and not self._serving.is_set():
                if line := log.readline():
                    self._take(line)
                else:
                    time.sleep(0.05)

    def _take(self, line: str) -> None:
        self.lines.append(line.rstrip())
        if line.startswith("serving"):
            self._serving.set()

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "it wrote nothing"


class LocalSwarm:
    """Nodes by name. A context manager that leaves no process behind, unless `keep` is set."""

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self.folder, self.keep = folder, keep
        self.nodes: dict[str, NodeProcess] = {}

    def __enter__(self) -> "LocalSwarm":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if not self.keep or kind is not None:
            self.stop()

    def start(self, name: str, *arguments: str) -> NodeProcess:
        node = NodeProcess(name, self.folder / name, arguments, outlive=self.keep)
        self.nodes[name] = node
        return node

    def wait_until_serving(
        self, seconds: float = START_SECONDS, each: Callable[[NodeProcess], None] = lambda _: None
    ) -> None:
        deadline = time.monotonic() + seconds
        for node in self.nodes.values():
            node.wait_until_serving(deadline)
            each(node)

    def wait_for_head(self, number: str, seconds: float) -> None:
        """Returns when every node serves the version. Raises Unreachable, naming one that does not, when time is up."""
        deadline = time.monotonic() + seconds
        # One by one, because asking costs the node a look into the DHT.
        for name, node in self.nodes.items():
            while (head := head_of(node)) != number:
                if time.monotonic() > deadline:
                    raise Unreachable(
                        f"{name} has not adopted {number} within {seconds:.0f} seconds; it is at {head or '?'}.",
                        f"The nodes' logs are in {self.folder}",
                    )
                time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        for node in self.nodes.values():
            node.stop()
        for node in self.nodes.values():
            node.wait()


def head_of(node: NodeProcess) -> str:
    """The number of the version that the node serves; empty when it does not answer."""
    try:
        with node.control() as client:
            return client.status().models[0].head.number
    except P2PModelError:
        return ""


def die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
