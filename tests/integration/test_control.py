"""The control API over a real Unix socket: a server in this process's loop, clients in threads as commands would be."""

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from p2pmodel.control.client import ControlClient
from p2pmodel.control.server import ControlServer
from p2pmodel.domain.errors import Busy, NotFound, NotRunning, P2PModelError, PeerFailed, Rejected, StorageError
from p2pmodel.wire.v1 import control_pb2 as pb

T = TypeVar("T")


class Service:
    """Answers from what a test has put in; raises `error` when there is one."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.stopping = asyncio.Event()
        self.peer = "p"

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        self._check()
        round_ = pb.RoundStatus(number=2, phase="open", patches=1, since_seconds=1.5)
        lease = pb.LeaseStatus(peer="p", span=pb.Span(start=0, end=3), versions=[pb.VersionRef(id="v", number="1.0.1")])
        model = pb.ModelStatus(
            id="m",
            name="starter",
            layers=6,
            round=round_,
            hosted=pb.Span(start=0, end=3),
            leases=[lease],
            coverage=[1, 1, 1, 0, 0, 0],
        )
        return pb.StatusReply(
            peer=self.peer,
            addresses=["/ip4/127.0.0.1/tcp/1/p2p/p"],
            pid=os.getpid(),
            models=[model],
            traffic={"blobs_sent": 1 << 40},
        )

    async def versions(self, request: pb.ListVersionsRequest) -> pb.ListVersionsReply:
        self._check()
        return pb.ListVersionsReply(model="m", versions=[pb.VersionInfo(version=pb.VersionRef(number="1.0.1"))])

    async def patches(self, request: pb.ListPatchesRequest) -> pb.ListPatchesReply:
        self._check()
        return pb.ListPatchesReply(model="m")

    async def publish(self, request: pb.PublishRequest) -> pb.PublishReply:
        self._check()
        return pb.PublishReply(patch=request.record, model="m", round=2)

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        self.stopping.set()
        return pb.StopReply()


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def server(socket: Path, service: Service) -> AsyncIterator[ControlServer]:
    server = ControlServer(socket, service)
    await server.start()
    yield server
    await server.stop()


async def ask(socket: Path, question: Callable[[ControlClient], T]) -> T:
    def run() -> T:
        with ControlClient.connect(socket) as client:
            return question(client)

    return await asyncio.to_thread(run)


async def test_every_call_brings_back_what_the_node_says(server: ControlServer, socket: Path) -> None:
    status = await ask(socket, ControlClient.status)
    assert status.pid == os.getpid()
    assert status.models[0].round.phase == "open"
    assert dict(status.traffic) == {"blobs_sent": 1 << 40}
    assert list(status.models[0].coverage) == [1, 1, 1, 0, 0, 0]
    assert (await ask(socket, lambda c: c.publish("d" * 64))).patch == "d" * 64


@pytest.mark.parametrize(
    "error",
    [
        NotFound("There is no model 'x'.", "See: p2pmodel status"),
        Rejected("shape", "Slot θ has shape (3,), not (4,)."),
        PeerFailed("It broke off.", "12D3KooW", "Try again."),
        StorageError("The disk is full." + "!" * 9000),
        P2PModelError("Something else."),
    ],
)
async def test_an_error_of_the_node_is_the_same_error_at_the_client(
    server: ControlServer, socket: Path, service: Service, error: P2PModelError
) -> None:
    service.error = error
    with pytest.raises(P2PModelError) as raised:
        await ask(socket, ControlClient.status)
    assert type(raised.value) is type(error)
    assert error.message.startswith(raised.value.message)
    assert raised.value.hint == error.hint
    assert raised.value.exit_code == error.exit_code
    assert {**vars(raised.value), "message": ""} == {**vars(error), "message": ""}


async def test_a_defect_of_the_node_is_one_sentence(server: ControlServer, socket: Path, service: Service) -> None:
    service.error = ZeroDivisionError("division by zero")
    with pytest.raises(P2PModelError, match="failed at this"):
        await ask(socket, ControlClient.status)


async def test_only_the_owner_may_connect(server: ControlServer, socket: Path) -> None:
    assert stat.S_IMODE(os.stat(socket).st_mode) == 0o600
    assert os.listdir(socket.parent) == ["control.sock"]


async def test_without_a_node_the_client_says_how_to_start_one(socket: Path) -> None:
    with pytest.raises(NotRunning, match="p2pmodel join"):
        ControlClient.connect(socket)
    with pytest.raises(NotRunning):
        ControlClient.connect(socket.parent / "no" / "home" / "control.sock")


async def test_stop_replies_and_leaves_no_socket(socket: Path, service: Service) -> None:
    server = ControlServer(socket, service)
    await server.start()
    await ask(socket, ControlClient.stop)
    await service.stopping.wait()
    await server.stop()
    await server.stop()
    assert not os.listdir(socket.parent)


async def test_a_second_node_on_the_home_is_refused(server: ControlServer, socket: Path, service: Service) -> None:
    with pytest.raises(Busy):
        await ControlServer(socket, service).start()
    assert (await ask(socket, ControlClient.status)).peer == "p"


LISTENER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("up", flush=True)
sys.stdin.read()
"""


async def test_the_socket_of_a_killed_node_is_replaced(socket: Path, service: Service) -> None:
    dead = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LISTENER, str(socket), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert dead.stdout is not None
    assert await dead.stdout.readline() == b"up\n"
    dead.kill()
    await dead.wait()
    with pytest.raises(NotRunning):
        ControlClient.connect(socket)
    server = ControlServer(socket, service)
    await server.start()
    assert (await ask(socket, ControlClient.status)).peer == "p"
    await server.stop()


async def test_a_server_that_stops_leaves_its_successors_socket(socket: Path, service: Service) -> None:
    first, second = ControlServer(socket, service), ControlServer(socket, service)
    await first.start()
    os.unlink(socket)
    await second.start()
    await first.stop()
    assert (await ask(socket, ControlClient.status)).peer == "p"
    await second.stop()


async def test_a_home_with_a_long_path_works(tmp_path: Path, service: Service) -> None:
    home = tmp_path / ("long" * 30)
    home.mkdir()
    server = ControlServer(home / "control.sock", service)
    await server.start()
    assert (await ask(home / "control.sock", ControlClient.status)).peer == "p"
    await server.stop()


async def test_a_client_outlives_nothing(socket: Path, service: Service) -> None:
    server = ControlServer(socket, service)
    await server.start()
    client = await asyncio.to_thread(ControlClient.connect, socket)
    assert (await asyncio.to_thread(client.status)).peer == "p"
    await server.stop()
    with pytest.raises(NotRunning):
        await asyncio.to_thread(client.status)
    client.close()


async def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path, service: Service) -> None:
    with pytest.raises(StorageError, match="No control socket"):
        await ControlServer(tmp_path / "nowhere" / "control.sock", service).start()


async def test_two_nodes_are_never_mistaken_for_each_other(tmp_path: Path) -> None:
    """The short path to a socket is the same text for two sockets, once the first client has been closed."""
    servers = {}
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        service = Service()
        service.peer = name
        servers[name] = ControlServer(tmp_path / name / "control.sock", service)
        await servers[name].start()
    try:
        for name in ("one", "two", "three", "one") * 3:
            socket = tmp_path / name / "control.sock"
            left_open = await asyncio.to_thread(ControlClient.connect, socket)
            assert (await asyncio.to_thread(left_open.status)).peer == name
            assert (await ask(socket, ControlClient.status)).peer == name
    finally:
        for server in servers.values():
            await server.stop()
