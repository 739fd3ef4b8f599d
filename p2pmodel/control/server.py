"""The node's end of the control API, with gRPC's standard health service and server reflection beside it.

The socket is bound inside a folder that only its owner can enter, made 0600, and only then moved to its place: at no
time can another user connect to it. Moving it also replaces, in one step, the socket that a dead node left behind. Over
TCP the API is served only with certificates on both sides (`control.certificates`).
"""

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from p2pmodel.control import failures
from p2pmodel.control.certificates import ServerTls
from p2pmodel.control.sockets import answers, reachable
from p2pmodel.domain.errors import Busy, InvalidInput, P2PModelError, StorageError
from p2pmodel.wire.v1 import control_pb2 as pb
from p2pmodel.wire.v1 import control_pb2_grpc as rpc

log = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 1.0
"""How long calls that run may go on when the server stops; enough for the reply of the call that stops it."""

WATCH_SECONDS, WATCH_LIMITS = 5.0, (0.5, 3600.0)

SERVICE: str = pb.DESCRIPTOR.services_by_name["Control"].full_name

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class ControlService(Protocol):
    """What a node answers. Whatever P2PModelError a method raises reaches the client as the same class."""

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply: ...

    async def versions(self, request: pb.ListVersionsRequest) -> pb.ListVersionsReply: ...

    async def patches(self, request: pb.ListPatchesRequest) -> pb.ListPatchesReply: ...

    async def publish(self, request: pb.PublishRequest) -> pb.PublishReply: ...

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        """Only asks for the end: it returns before the node, and with it this server, stops."""
        ...


@dataclass(frozen=True)
class Remote:
    """Where the API is served beside the socket. port: 0 takes a free one."""

    host: str
    port: int
    tls: ServerTls


class ControlServer:
    """port: that of `remote`, once it is started; 0 without one."""

    def __init__(self, socket: Path, service: ControlService, remote: Remote | None = None) -> None:
        self.port = 0
        self._remote = remote
        self._health = health.aio.HealthServicer()
        self._path = socket
        self._service = service
        self._server: grpc.aio.Server | None = None
        self._inode = 0

    async def start(self) -> None:
        """Raises Busy when another node listens on the socket, or somebody on the port, StorageError when the socket
        cannot be made there, InvalidInput for certificates that do not fit together."""
        if answers(self._path):
            raise Busy(f"Another node runs on {self._path.parent}.", "Stop it, or give this one another --home.")
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        rpc.add_ControlServicer_to_server(_Servicer(self._service), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        if self._remote:
            self.port = _listen(server, self._remote)
        try:
            private = Path(tempfile.mkdtemp(prefix=".control-", dir=self._path.parent))
        except OSError as error:
            raise StorageError(f"No control socket can be made in {self._path.parent}: {error.strerror}.") from None
        try:
            bound = private / "socket"
            with reachable(bound) as short:
                server.add_insecure_port(f"unix:{short}")
                await server.start()
            bound.chmod(0o600)
            self._inode = bound.stat().st_ino
            bound.replace(self._path)
        except (OSError, RuntimeError) as error:
            await server.stop(None)
            raise StorageError(f"No control socket can be made at {self._path}: {error}.") from None
        finally:
            shutil.rmtree(private, ignore_errors=True)
        self._server = server

    async def stop(self) -> None:
        """Ends the calls that run and removes the socket, unless it is by now another server's. May be repeated."""
        if self._server is None:
            return
        server, self._server = self._server, None
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        await self._health.enter_graceful_shutdown()
        await server.stop(STOP_GRACE_SECONDS)


def _listen(server: grpc.aio.Server, remote: Remote) -> int:
    address = f"[{remote.host}]:{remote.port}" if ":" in remote.host else f"{remote.host}:{remote.port}"
    credentials = remote.tls.credentials()
    try:
        port: int = server.add_secure_port(address, credentials)
    except RuntimeError:
        hint = "Choose another address with --control-listen."
        raise Busy(f"The control API cannot listen on {address}.", hint) from None
    return port


class _Servicer(rpc.ControlServicer):
    """gRPC's names for the service's methods."""

    def __init__(self, service: ControlService) -> None:
        self._service = service

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.StatusReply:
        return await _answer(self._service.status, request, context)

    async def Watch(self, request: pb.WatchRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.StatusReply]:
        seconds = request.interval_seconds or WATCH_SECONDS
        if not WATCH_LIMITS[0] <= seconds <= WATCH_LIMITS[1]:
            await _abort(context, InvalidInput("A watch's interval has to be between 0.5 and 3600 seconds."))
        while True:
            yield await _answer(self._service.status, pb.StatusRequest(), context)
            await asyncio.sleep(seconds)

    async def ListVersions(
        self, request: pb.ListVersionsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListVersionsReply:
        return await _answer(self._service.versions, request, context)

    async def ListPatches(
        self, request: pb.ListPatchesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListPatchesReply:
        return await _answer(self._service.patches, request, context)

    async def Publish(self, request: pb.PublishRequest, context: grpc.aio.ServicerContext) -> pb.PublishReply:
        return await _answer(self._service.publish, request, context)

    async def Stop(self, request: pb.StopRequest, context: grpc.aio.ServicerContext) -> pb.StopReply:
        return await _answer(self._service.stop, request, context)


async def _answer(
    method: Callable[[Request], Awaitable[Reply]], request: Request, context: grpc.aio.ServicerContext
) -> Reply:
    try:
        return await method(request)
    except P2PModelError as error:
        log.debug("control: %s", error)
        await _abort(context, error)


async def _abort(context: grpc.aio.ServicerContext, error: P2PModelError) -> NoReturn:
    metadata = ((failures.METADATA_KEY, failures.pack(error)),)
    await context.abort(failures.status_of(error), error.message[: failures.MAX_TEXT], metadata)
    raise AssertionError("abort returned") from error
