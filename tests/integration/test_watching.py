"""`p2pmodel status --watch` in a terminal of its own, of a node that comes and goes."""

import asyncio
import os
import pty
import re
import signal
import struct
import subprocess
import sys
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest

from p2pmodel.control.server import ControlServer
from p2pmodel.domain.errors import NotRunning
from p2pmodel.store.home import Home
from p2pmodel.wire.v1 import control_pb2 as pb


class Service:
    """Implements `ControlService`, of which only the status is asked."""

    def __init__(self) -> None:
        self.number = "1.0.1"

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        host = pb.LeaseStatus(peer="12D3KooWabcdefgh", span=pb.Span(start=0, end=2), dtype="fp32", layer_seconds=0.001)
        model = pb.ModelStatus(
            id="ab" * 32,
            name="starter",
            head=pb.VersionRef(id="ab" * 32, number=self.number),
            layers=4,
            leases=[host],
            coverage=[1, 1, 0, 0],
            presences=[pb.PresenceStatus(peer="12D3KooWabcdefgh", roles=["\x1b[2Jhost"])],
            round=pb.RoundStatus(number=3, phase="voting", since_seconds=7300),
        )
        return pb.StatusReply(peer="12D3KooWabcdefgh", models=[model])

    async def versions(self, request: pb.ListVersionsRequest) -> pb.ListVersionsReply:
        return pb.ListVersionsReply()

    async def patches(self, request: pb.ListPatchesRequest) -> pb.ListPatchesReply:
        return pb.ListPatchesReply()

    async def publish(self, request: pb.PublishRequest) -> pb.PublishReply:
        raise NotRunning("Nothing is published here.")

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        raise NotRunning("Nothing is stopped here.")


class Terminal:
    """A command in a pseudo-terminal; `text` is all that it wrote, without colours."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.text = ""

    async def until(self, wanted: str) -> None:
        async with asyncio.timeout(30):
            while wanted not in self.text:
                try:
                    raw = await asyncio.to_thread(os.read, self._master, 65536)
                except OSError:
                    pytest.fail(f"it ended without {wanted!r}: {self.text[-500:]}")
                self.text += re.sub(r"\x1b\[[0-9;]*m", "", raw.decode(errors="replace"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


async def test_it_follows_the_node_and_ends_cleanly(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    service = Service()
    server = ControlServer(home.control_socket, service)
    await server.start()
    terminal = Terminal(sys.executable, "-m", "p2pmodel", "status", "--watch", "--home", str(home.path))
    try:
        await terminal.until("starter 1.0.1")
        await terminal.until("2 of 4 layers served")
        await terminal.until("round 3: voting for 2 h")
        await terminal.until("�[2Jhost")
        service.number = "1.0.2"
        await terminal.until("starter 1.0.2")
        await server.stop()
        await terminal.until("No node runs on this home.")
        terminal.process.send_signal(signal.SIGINT)
        await terminal.until("\x1b[?1049l")  # the screen that was there before
        assert await asyncio.to_thread(terminal.process.wait, 20) == 0
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()


@pytest.mark.parametrize(("options", "status"), [([], 2), (["--json"], 2)])
def test_without_a_terminal_it_says_so(tmp_path: Path, options: list[str], status: int) -> None:
    command = [sys.executable, "-m", "p2pmodel", "status", "--watch", "--home", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "--watch" in done.stderr
