"""Multiaddrs: how a peer can be reached, as text that people type and peers publish."""

import errno
import socket
from collections.abc import Sequence

from hivemind.utils.multiaddr import Multiaddr, exceptions

from p2pmodel.domain.errors import Busy, UsageError
from p2pmodel.domain.ids import PeerId, check_peer

EXAMPLE = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"
LISTEN_EXAMPLE = "/ip4/0.0.0.0/tcp/31337"


def parse_peer_address(text: str) -> tuple[PeerId, Multiaddr]:
    """The peer at the end of a full multiaddr, and the way to it. Raises UsageError with an example of a right one."""
    try:
        address = Multiaddr(text)
        peers = [value for protocol, value in address.items() if protocol.name == "p2p"]
        peer = PeerId(peers[-1])
        check_peer(peer, "the peer")
        if not text.endswith(f"/p2p/{peer}") or len(list(address.items())) < 2:
            raise ValueError("the peer's id has to come last")
        return peer, Multiaddr(text.removesuffix(f"/p2p/{peer}"))
    except (ValueError, LookupError, exceptions.Error):
        raise UsageError(f"{text[:200]!r} is not the address of a peer.", f"It has to look like {EXAMPLE}.") from None


def check_listen_address(text: str) -> Multiaddr:
    """Raises UsageError with an example of a right one, and Busy naming the port when somebody else listens on it."""
    try:
        address = Multiaddr(text)
        parts = {protocol.name: value for protocol, value in address.items()}
        family, host = (socket.AF_INET6, parts["ip6"]) if "ip6" in parts else (socket.AF_INET, parts["ip4"])
        kind = socket.SOCK_STREAM if "tcp" in parts else socket.SOCK_DGRAM
        port = int(parts["tcp"] if "tcp" in parts else parts["udp"])
    except (ValueError, LookupError, exceptions.Error):
        hint = f"It has to look like {LISTEN_EXAMPLE}."
        raise UsageError(f"{text[:200]!r} is not an address to listen on.", hint) from None
    if port:
        _check_port(family, kind, host, port)
    return address


def is_loopback(addresses: Sequence[Multiaddr]) -> bool:
    return all(str(address).startswith(("/ip4/127.", "/ip6/::1/")) for address in addresses)


def _check_port(family: int, kind: int, host: str, port: int) -> None:
    # p2pd binds with SO_REUSEPORT, so two of them would share a port in silence, each with half of the connections.
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                hint = "Stop what listens there, or choose another port."
                raise Busy(f"Port {port} on {host} is in use.", hint) from None
            if error.errno == errno.EACCES:
                hint = "Choose one above 1023."
                raise UsageError(f"Port {port} needs more rights than this process has.", hint) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(f"This machine has no address {host}.", "Listen on 0.0.0.0 for all of them.") from None
            raise
