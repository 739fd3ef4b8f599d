"""Nodes forked from a process that has imported everything: importing it again for each costs seconds of CPU.

They run the same program as `p2pmodel join`, in processes, sessions and sockets of their own; tests/e2e starts them as
a user does.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import IO, cast

from p2pmodel.cli import localswarm

IMPORTED = [
    "p2pmodel.cli.app",
    "p2pmodel.node.node",
    "p2pmodel.node.hosting.hosting",
    "p2pmodel.node.lineages.founding",
    "p2pmodel.node.rounds.maintaining",
    "transformers.models.llama.modeling_llama",
]
_launch = localswarm.launch
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)
_environment: dict[str, str] = {}


class ForkedProcess:
    """What `localswarm.NodeProcess` uses of `subprocess.Popen`."""

    def __init__(self, process: ForkServerProcess, stdout: IO[str]) -> None:
        self._process, self.stdout = process, stdout
        self.pid: int = cast(int, process.pid)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("p2pmodel", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)


def launch(arguments: Sequence[str], log: IO[bytes], outlive: bool) -> "ForkedProcess | subprocess.Popen[str]":
    """Instead of `localswarm.launch`."""
    _environment.update({} if _environment else _read_by_libraries(os.environ))
    if outlive or _environment != _read_by_libraries(os.environ):
        return _launch(arguments, log, outlive)
    lines, output = _context.Pipe(duplex=False)
    with output, Connection(os.dup(log.fileno()), readable=False) as errors:
        process = _context.Process(
            target=_run,
            args=(list(arguments), output, errors, dict(os.environ), os.getcwd()),
            daemon=True,  # what a test that failed has left is ended with the tests
        )
        process.start()
    with lines:
        return ForkedProcess(process, os.fdopen(os.dup(lines.fileno()), encoding="utf-8"))


def _read_by_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    """What counts when a library is imported, and so has to be the same for all that share the import."""
    return {k: v for k, v in environment.items() if not k.startswith(("P2PMODEL_", "PYTEST_"))}


def _run(
    arguments: list[str], output: Connection, errors: Connection, environment: Mapping[str, str], folder: str
) -> None:
    localswarm.die_with_parent()
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for connection, number in ((output, 1), (errors, 2)):
        os.dup2(connection.fileno(), number)
        connection.close()
    sys.argv = ["p2pmodel", *arguments]
    from p2pmodel.cli.app import main

    main()
