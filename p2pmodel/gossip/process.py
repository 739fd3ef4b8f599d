"""One gossip child, as a process: started with its end of a socketpair, spoken to in frames, and reaped."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import p2pmodel
from p2pmodel.domain.errors import Busy, PeerFailed, UsageError
from p2pmodel.gossip import frames

log = logging.getLogger(__name__)

READ_BYTES = 64 << 10
MAX_LINE_CHARACTERS = 2000
SILENCE_SECONDS = 60.0
"""A child that says nothing for so long is stuck: it reports at least every ten seconds."""

GRACE_SECONDS = 4.0
REAP_SECONDS = 0.02

_ROOT = Path(p2pmodel.__file__).resolve().parents[1]


class ChildProcess:
    """Made by `start`. Its socket is its life: it ends when we close our end, and we read the end when it dies."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._incoming: frames.Incoming[frames.FromChild] = frames.Incoming(self._receive, frames.FromChild)

    @classmethod
    async def start(cls) -> "ChildProcess":
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = _execute(theirs.fileno())
        return cls(process, *await asyncio.open_unix_connection(sock=ours))

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, message: frames.ToChild) -> None:
        """Waits while the child reads slowly. Does nothing when it is gone: `next` tells."""
        self._writer.write(frames.encode(message))
        try:
            await self._writer.drain()
        except ConnectionError:
            return

    async def ready(self) -> frames.Ready:
        """Waits for the child to listen. Raises Busy, UsageError (an address that is none) or PeerFailed."""
        match await self.next():
            case frames.Ready() as ready:
                return ready
            case frames.Failed(busy, text):
                raise Busy(text, "Choose another port.") if busy else UsageError(text)
            case _:
                raise PeerFailed(f"The gossip process ended before it was ready (status {await self.close()}).")

    async def next(self) -> frames.FromChild | None:
        """None when the child is gone. Raises Rejected("frame") for nonsense, PeerFailed for a child that is stuck."""
        return await self._incoming.next()

    async def _receive(self) -> bytes:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                return await self._reader.read(READ_BYTES)
        except ConnectionError:
            return b""
        except TimeoutError:
            raise PeerFailed("The gossip process is stuck.") from None

    async def close(self) -> int:
        """Ends the child, gently first, and reaps it. Its exit status, or minus the signal that ended it."""
        self._writer.close()
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                return await self._reaped()
        except TimeoutError:
            self._process.kill()
            return await self._reaped()
        except asyncio.CancelledError:
            self._process.kill()
            raise

    async def _reaped(self) -> int:
        while (status := self._process.poll()) is None:  # noqa: ASYNC110 - nothing says when
            await asyncio.sleep(REAP_SECONDS)
        return status


def _execute(fd: int) -> "subprocess.Popen[bytes]":
    """Imports from where we did, not from the current directory. Not in a thread of its own: the child dies with the
    thread that made it (PR_SET_PDEATHSIG). Its own process group keeps the terminal's Ctrl-C away while it starts."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "p2pmodel.gossip.child", str(fd)],
        pass_fds=[fd],
        process_group=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stderr
    threading.Thread(target=_relay, args=(process.stderr,), name="gossip-log", daemon=True).start()
    return process


def _relay(lines: IO[bytes]) -> None:
    """What the child says becomes this process's log, whatever its format, until the child has ended."""
    with lines:
        while line := lines.readline(MAX_LINE_CHARACTERS):
            log.warning("%s", line.decode(errors="replace").rstrip())
