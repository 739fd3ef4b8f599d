"""The node's end of the control API.

The socket is bound inside a folder that only its owner can enter, made 0600, and only then moved to its place: at no
time can another user connect to it. Moving it also replaces, in one step, the socket that a dead node left behind.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from p2pmodel.control import failures
from p2pmodel.control.sockets import answers, reachable
from p2pmodel.domain.errors import Busy, P2PModelError, StorageError
from p2pmodel.wire.v1 import control_pb2 as pb
from p2pmodel.wire.v1 import control_pb2_grpc as rpc

log = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 1.0
"""How long calls that run may go on when the server stops; enough for the reply of the call that stops it."""

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class ControlService(Protocol):
    """What a node answers. Whatever P2PModelError a method raises reaches the client as the same class."""

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply: ...

    async def publish(self, request: pb.PublishRequest) -> pb.PublishReply: ...

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        """Only asks for the end: it returns before the node, and with it this server, stops."""
        ...


class ControlServer:
    def __init__(self, socket: Path, service: ControlService) -> None:
        self._path = socket
        self._service = service
        self._server: grpc.aio.Server | None = None
        self._inode = 0

    async def start(self) -> None:
        """Raises Busy when another node listens on the socket, StorageError when it cannot be made there."""
        if answers(self._path):
            raise Busy(f"Another node runs on {self._path.parent}.", "Stop it, or give this one another --home.")
        server = grpc.aio.server()
        rpc.add_ControlServicer_to_server(_Servicer(self._service), server)
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
        await server.stop(STOP_GRACE_SECONDS)


class _Servicer(rpc.ControlServicer):
    """gRPC's names for the service's methods."""

    def __init__(self, service: ControlService) -> None:
        self._service = service

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.StatusReply:
        return await _answer(self._service.status, request, context)

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
        metadata = ((failures.METADATA_KEY, failures.pack(error)),)
        await context.abort(failures.status_of(error), error.message[: failures.MAX_TEXT], metadata)
        raise AssertionError("abort returned") from error
