"""The commands' end of the control API: synchronous, since a command asks one thing and leaves."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
from google.protobuf.message import Message

from p2pmodel.control import failures
from p2pmodel.control.sockets import answers, reachable
from p2pmodel.domain.errors import NotRunning, P2PModelError, PeerFailed, StorageError
from p2pmodel.wire.v1 import control_pb2 as pb
from p2pmodel.wire.v1 import control_pb2_grpc as rpc

Reply = TypeVar("Reply")

CALL_SECONDS = 10.0
PUBLISH_SECONDS = 60.0
"""Publishing reads and checks the patch's blobs."""


class ControlClient:
    """A connection to the node of one home, for a `with` statement.

    All methods raise what the node raised (a P2PModelError), NotRunning when it ended meanwhile, and PeerFailed when it
    does not answer in time.
    """

    def __init__(self, channel: grpc.Channel, resources: ExitStack) -> None:
        self._stub = rpc.ControlStub(channel)
        self._close = weakref.finalize(self, resources.close)

    @classmethod
    def connect(cls, socket: Path) -> "ControlClient":
        """Raises NotRunning when nobody listens on the socket, StorageError when it is not this user's."""
        try:
            if not answers(socket):
                raise _not_running()
        except PermissionError:
            raise StorageError(f"{socket} belongs to another user.", "Run this as the node's user.") from None
        with ExitStack() as stack:
            # gRPC connects, and connects again, whenever it likes: the short path has to stay valid.
            short = stack.enter_context(reachable(socket))
            # gRPC pools connections by address, and the next short path may be the same text for another socket.
            own = (("grpc.use_local_subchannel_pool", 1),)
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{short}", options=own))
            return cls(channel, stack.pop_all())

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def status(self) -> pb.StatusReply:
        reply: pb.StatusReply = _call(self._stub.Status, pb.StatusRequest(), CALL_SECONDS)
        return reply

    def publish(self, record: str) -> pb.PublishReply:
        """`record`: digest of a signed patch record that is, with its blobs, in the home's store."""
        reply: pb.PublishReply = _call(self._stub.Publish, pb.PublishRequest(record=record), PUBLISH_SECONDS)
        return reply

    def stop(self) -> None:
        """Returns when the node has taken note; it still needs a moment to end."""
        _call(self._stub.Stop, pb.StopRequest(), CALL_SECONDS)


def _call(method: Callable[..., Reply], request: Message, seconds: float) -> Reply:
    try:
        return method(request, timeout=seconds)
    except grpc.RpcError as error:
        raise _translate(error) from None


def _translate(error: grpc.RpcError) -> P2PModelError:
    for key, value in error.trailing_metadata() or ():
        if key == failures.METADATA_KEY:
            return failures.unpack(value)
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return _not_running()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerFailed("The node on this machine does not answer.", hint="See its log, or start it again.")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return P2PModelError("The node that runs is older than this command.", "Restart it: p2pmodel join")
    return P2PModelError(f"The node failed at this: {error.details()}", "Its log has the details.")


def _not_running() -> NotRunning:
    return NotRunning("No node runs on this home.", "Start one with: p2pmodel join")
