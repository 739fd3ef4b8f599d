"""The control API for programs in any language: reflection, health, and TCP with certificates on both sides."""

import asyncio
import json
import os
import socket as sockets
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from p2pmodel.cli.app import app
from p2pmodel.control.certificates import issue_client, make_authority
from p2pmodel.control.server import SERVICE, ControlServer, Remote
from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, UsageError
from p2pmodel.node.machine.remote_control import remote_control
from p2pmodel.wire.v1 import control_pb2 as pb
from p2pmodel.wire.v1 import control_pb2_grpc as rpc
from scripts.generate import outdated
from tests.integration.test_control import Service

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "control" / "status.py"
ANY_PORT = ("127.0.0.1", 0)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    made = CliRunner().invoke(app, ["control", "certificates", str(folder), "--host", "node.example.org"])
    assert made.exit_code == 0, made.output
    return folder


@pytest.fixture
async def server(tmp_path: Path, tls: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(tmp_path / "control.sock", Service(), remote_control(ANY_PORT, tls))
    await server.start()
    yield server
    await server.stop()


def credentials(folder: Path, name: str = "client", authority: Path | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        ((authority or folder) / "ca.pem").read_bytes(),
        (folder / f"{name}.key").read_bytes(),
        (folder / f"{name}.pem").read_bytes(),
    )


async def status(port: int, with_these: grpc.ChannelCredentials | None, name: str = "localhost") -> pb.StatusReply:
    """Raises grpc.aio.AioRpcError."""
    options = (("grpc.ssl_target_name_override", name),)
    channel = (
        grpc.aio.secure_channel(f"127.0.0.1:{port}", with_these, options)
        if with_these
        else grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    )
    async with channel:
        reply: pb.StatusReply = await rpc.ControlStub(channel).Status(pb.StatusRequest(), timeout=10)
        return reply


@pytest.mark.parametrize("way", ["socket", "tcp"])
async def test_a_program_that_knows_nothing_of_p2pmodel_can_call(
    server: ControlServer, tmp_path: Path, tls: Path, way: str
) -> None:
    address = [f"unix:{tmp_path / 'control.sock'}"] if way == "socket" else [f"127.0.0.1:{server.port}", "--tls", tls]
    asked = await asyncio.create_subprocess_exec(
        sys.executable, "-I", EXAMPLE, *address, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
    )
    out, err = await asked.communicate()
    assert asked.returncode == 0, err.decode()
    assert json.loads(out)["pid"] == os.getpid()


async def test_health_is_said_in_the_standard_way(server: ControlServer, tmp_path: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'control.sock'}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_program_can_watch_and_list(server: ControlServer, tmp_path: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'control.sock'}") as channel:
        control = rpc.ControlStub(channel)
        watching = control.Watch(pb.WatchRequest(interval_seconds=0.5), timeout=20)
        assert [(await watching.read()).pid for _ in range(2)] == [os.getpid()] * 2
        watching.cancel()
        with pytest.raises(grpc.aio.AioRpcError, match="interval"):
            await control.Watch(pb.WatchRequest(interval_seconds=0.01)).read()
        assert (await control.ListVersions(pb.ListVersionsRequest())).versions[0].version.number == "1.0.1"
        assert (await control.ListPatches(pb.ListPatchesRequest())).model == "m"


async def test_over_tcp_only_those_with_a_certificate_of_the_authority_get_in(
    server: ControlServer, tls: Path, tmp_path: Path
) -> None:
    assert (await status(server.port, credentials(tls))).pid == os.getpid()
    assert (await status(server.port, credentials(tls), "node.example.org")).pid == os.getpid()
    CliRunner().invoke(app, ["control", "client", str(tls), "laptop"])
    assert (await status(server.port, credentials(tls, "laptop"))).pid == os.getpid()

    stranger = issue_client(make_authority(), "client")
    (tmp_path / "client.key").write_bytes(stranger.key)
    (tmp_path / "client.pem").write_bytes(stranger.certificate)
    only_the_authority = grpc.ssl_channel_credentials((tls / "ca.pem").read_bytes())
    for these in (None, only_the_authority, credentials(tmp_path, authority=tls)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await status(server.port, these)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.aio.AioRpcError):
        await status(server.port, credentials(tls), "elsewhere.example.org")


async def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path, tls: Path) -> None:
    with sockets.create_server(("127.0.0.1", 0)) as taken:
        remote = remote_control(("127.0.0.1", taken.getsockname()[1]), tls)
        with pytest.raises(Busy, match="cannot listen"):
            await ControlServer(tmp_path / "control.sock", Service(), remote).start()
    assert os.listdir(tmp_path) == []


def test_there_is_no_tcp_without_certificates(tmp_path: Path, tls: Path) -> None:
    assert remote_control(None, None) is None
    for listen, folder in ((ANY_PORT, None), (None, tls)):
        with pytest.raises(UsageError, match="only with TLS"):
            remote_control(listen, folder)
    with pytest.raises(NotFound, match=r"server\.pem"):
        remote_control(ANY_PORT, tmp_path)


async def test_certificates_that_do_not_fit_together_are_refused(tmp_path: Path, tls: Path) -> None:
    for name in ("ca.pem", "server.pem", "server.key"):
        (tmp_path / name).write_bytes((tls / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    (tmp_path / "server.key").chmod(0o644)
    with pytest.raises(InvalidInput, match="other users"):
        remote_control(ANY_PORT, tmp_path)
    (tmp_path / "server.key").chmod(0o600)
    for name, other in (("ca.pem", make_authority().certificate), ("server.key", make_authority().key)):
        before = (tmp_path / name).read_bytes()
        for wrong in (other, b"nonsense"):
            (tmp_path / name).write_bytes(wrong)
            remote = remote_control(ANY_PORT, tmp_path)
            assert isinstance(remote, Remote)
            with pytest.raises(InvalidInput):
                await ControlServer(tmp_path / "control.sock", Service(), remote).start()
        (tmp_path / name).write_bytes(before)


def test_what_is_made_is_for_its_owner_alone_and_never_overwritten(tls: Path) -> None:
    assert {stat.S_IMODE(path.stat().st_mode) for path in tls.iterdir()} == {0o600}
    again = CliRunner().invoke(app, ["control", "certificates", str(tls)])
    assert isinstance(again.exception, UsageError)
    for name in ("client", "ca", "../x", ""):
        assert isinstance(CliRunner().invoke(app, ["control", "client", str(tls), name]).exception, UsageError)
    wrong = CliRunner().invoke(app, ["control", "certificates", str(tls.parent / "new"), "--host", "a b"])
    assert isinstance(wrong.exception, UsageError)
    assert not (tls.parent / "new").exists()


def test_the_documentation_is_what_the_proto_says() -> None:
    assert not [*outdated("control")]
