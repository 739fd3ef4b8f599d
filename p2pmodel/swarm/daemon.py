"""The P2P daemon: its process, which never outlives this one, and requests to it over its control socket.

Every control connection made here is closed here: hivemind's own calls leave theirs open when they fail or are
cancelled.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from p2pmodel.domain.errors import P2PModelError, PeerFailed
from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm.addresses import is_loopback
from p2pmodel.swarm.membership import Membership

StreamHandler = Callable[[Any, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

STARTUP_SECONDS = 30
_STOP_SECONDS = 5.0

# p2pd notices that its client is gone, but not while it starts or when it hangs: the kernel kills it with its parent. A
# session of its own keeps a terminal's Ctrl-C and hang-up from it, so that the node alone decides the order of the end.
_LAUNCHER = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.setsid()
os.execv(sys.argv[2], sys.argv[2:])
"""


class Daemon(P2P):  # type: ignore[misc]
    """hivemind's P2P, whose process dies with its parent, and whose sockets are gone when `end` returns. In a private
    swarm nobody but members reaches a handler, and nobody else is told anything."""

    membership: Membership

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        command = P2P._make_process_args(*args, **kwargs)
        return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]

    @classmethod
    async def launch(
        cls,
        key_file: str,
        listen: Sequence[Multiaddr],
        relays: Sequence[str],
        client_only: bool,
        membership: Membership,
    ) -> "Daemon":
        """Raises P2PModelError with the daemon's last words when it does not start."""
        try:
            daemon: Daemon = await cls.create(
                identity_path=key_file,
                check_if_identity_free=False,
                startup_timeout=STARTUP_SECONDS,
                host_maddrs=list(listen),
                dht_mode="client" if client_only else "server",
                nat_port_map=not is_loopback(listen),
                use_auto_relay=bool(relays),
                trusted_relays=list(relays) or None,
            )
        except (P2PDaemonError, OSError) as error:
            hint = "Check the addresses to listen on."
            raise P2PModelError(f"The P2P daemon did not start: {error}.", hint) from None
        daemon.membership = membership
        return daemon

    async def end(self) -> None:
        """The process has ended and its sockets are removed when this returns."""
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self.shutdown()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()

    def _terminate(self) -> None:
        super()._terminate()
        for address in (self._daemon_listen_maddr, self._client_listen_maddr):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address["unix"])

    async def ended(self) -> int:
        """Waits until the process ends, by itself or by `end`; its exit status."""
        status: int = await self._child.wait()
        return status

    async def dial(self, peer: PeerId, ways: Sequence[Multiaddr], seconds: float) -> None:
        """Raises PeerFailed when the peer cannot be connected to in time."""
        connect = p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer).to_bytes(),
            addrs=[way.to_bytes() for way in ways],
            timeout=max(1, round(seconds)),
        )
        _, writer = await self._ask(peer, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect), seconds)
        writer.close()

    async def open_stream(
        self, peer: PeerId, protocol: str, seconds: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A binary stream to the peer's handler of `protocol`. Raises PeerFailed when there is none in time."""
        until = asyncio.get_running_loop().time() + seconds
        stream = p2pd_pb2.StreamOpenRequest(
            peer=PeerID.from_base58(peer).to_bytes(), proto=[protocol], timeout=max(1, round(seconds))
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=stream)
        reader, writer = await self._ask(peer, request, seconds)
        try:
            async with asyncio.timeout_at(until):
                await self.membership.greet_async(reader, writer, protocol, peer)
        except TimeoutError:
            writer.close()
            raise PeerFailed(f"{peer} did not answer in {seconds:.0f} s.", peer) from None
        except BaseException:
            writer.close()
            raise
        return reader, writer

    async def add_binary_stream_handler(self, name: str, handler: StreamHandler, balanced: bool = False) -> None:
        async def guarded(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if await self.membership.admit(reader, writer, name, PeerId(info.peer_id.to_base58())):
                await handler(info, reader, writer)
            else:
                writer.close()

        await super().add_binary_stream_handler(name, guarded if self.membership.private else handler, balanced)

    async def _add_protobuf_unary_handler(
        self,
        handle_name: str,
        handler: Callable[[Any, P2PContext], Awaitable[Any]],
        input_protobuf_type: Any,
        balanced: bool = False,
    ) -> None:
        async def guarded(sealed: bytes, caller: PeerID) -> bytes:
            peer = PeerId(caller.to_base58())
            request = input_protobuf_type.FromString(self.membership.open_request(sealed, handle_name, peer))
            response = await handler(request, P2PContext(handle_name, self.peer_id, caller))
            return self.membership.seal_response(response.SerializeToString(), handle_name, peer)

        await self._client.add_unary_handler(handle_name, guarded, balanced=balanced)

    async def _call_unary_protobuf_handler(
        self, peer_id: PeerID, handle_name: str, input: Any, output_protobuf_type: Any
    ) -> Any:
        peer = PeerId(peer_id.to_base58())
        sealed = self.membership.seal_request(input.SerializeToString(), handle_name, peer)
        answer = await self._client.call_unary_handler(peer_id, handle_name, sealed)
        return output_protobuf_type.FromString(self.membership.open_response(answer, handle_name, peer))

    async def _ask(
        self, peer: PeerId, request: Any, seconds: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(self._daemon_listen_maddr["unix"])
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise PeerFailed(f"{peer} cannot be reached: {response.error.msg[:300]}.", peer)
            answered, writer = writer, None
            return reader, answered
        except TimeoutError:
            raise PeerFailed(f"{peer} did not answer in {seconds:.0f} s.", peer) from None
        except (OSError, asyncio.IncompleteReadError):
            raise PeerFailed(f"{peer} cannot be reached: this node's own P2P daemon does not answer.", peer) from None
        finally:
            if writer is not None:
                writer.close()
