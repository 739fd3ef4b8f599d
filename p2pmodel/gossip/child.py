"""The gossip child: `python -m p2pmodel.gossip.child FD`, where FD is its end of a socketpair with the node.

It ends when that socket closes, however the node ended. Ctrl-C, which a terminal sends to the whole foreground group,
is the node's business: the child ignores it, and ends when the node has said its last.
"""

import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Iterable
from types import ModuleType

import trio

from p2pmodel.gossip import frames

SHUTDOWN_SECONDS = 2
SEED = slice(4, 36)
"""Of an Ed25519 private key in libp2p's format."""

UNUSED = ("httpx", "requests")
"""What libp2p 0.8 imports for AutoTLS alone, which no gossip uses: a seventh of the child's memory."""

_PR_SET_PDEATHSIG = 1


async def serve(sock: socket.socket) -> None:
    link = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def receive() -> bytes:
        try:
            return bytes(await link.receive_some())
        except trio.BrokenResourceError:
            return b""

    messages: frames.Incoming[frames.ToChild] = frames.Incoming(receive, frames.ToChild)
    start = await messages.next()
    if not isinstance(start, frames.Start):
        return
    failure = cannot_listen(start.listen)
    if failure is not None:
        await link.send_all(frames.encode(failure))
        return
    # libp2p takes more than a second to import: not before there is a port for it.
    leave_out(UNUSED)
    from p2pmodel.gossip.mesh import open_mesh
    from p2pmodel.gossip.service import Service

    async with open_mesh(start.key[SEED], start.listen, start.psk) as mesh, trio.open_nursery() as nursery:
        await Service(link, mesh, nursery).run(messages)
        leave_quietly()
        nursery.cancel_scope.cancel()


def cannot_listen(listen: str) -> frames.Failed | None:
    """Tries the address without SO_REUSEPORT: libp2p binds with it, and would silently share another node's port."""
    match listen.split("/"):
        case ["", "ip4" | "ip6" as family, host, "tcp", port] if port.isdecimal() and int(port) < 1 << 16:
            pass
        case _:
            return frames.Failed(False, f"{listen} is not an address to listen on for gossip (/ip4/HOST/tcp/PORT).")
    with socket.socket(socket.AF_INET6 if family == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return frames.Failed(True, f"Gossip cannot listen on {listen}: {error.strerror}.")
    return None


class _LeftOut(ModuleType):
    """Has any name, as a class that does nothing: enough for annotations and for `except` clauses."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def leave_out(modules: Iterable[str]) -> None:
    """They are not loaded when somebody imports them from now on."""
    for name in modules:
        sys.modules.setdefault(name, _LeftOut(name))


def leave_quietly() -> None:
    """What libp2p says while its peers go away helps nobody; and should it hang, the alarm ends the process."""
    logging.disable()
    signal.alarm(SHUTDOWN_SECONDS)


def die_with_parent() -> None:
    """Linux only; elsewhere, and should the parent be gone already, the end of the socket ends the child."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def log_warnings() -> None:
    """The parent logs them. libp2p's loggers have handlers and levels of their own: the limit is our handler's."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("libp2p").propagate = True


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    log_warnings()
    trio.run(serve, socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
