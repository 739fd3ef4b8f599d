"""Where a node serves its control API beside the socket in its home, and with which certificates."""

from pathlib import Path

from p2pmodel.control.certificates import ServerTls
from p2pmodel.control.server import Remote
from p2pmodel.domain.errors import UsageError
from p2pmodel.store.secrets import read_secret

MAX_PEM_BYTES = 64 << 10


def remote_control(listen: tuple[str, int] | None, tls: Path | None) -> Remote | None:
    """listen: host and port; tls: a folder that `p2pmodel control certificates` made. Raises UsageError for one without
    the other, NotFound, InvalidInput, StorageError."""
    if listen is None and tls is None:
        return None
    if listen is None or tls is None:
        raise UsageError(
            "The control API is served over TCP only with TLS: --control-listen and --control-tls go together.",
            "Make certificates: p2pmodel control certificates DIR",
        )
    pems = [_read(tls / name) for name in ("server.pem", "server.key", "ca.pem")]
    return Remote(*listen, ServerTls(*pems))


def _read(path: Path) -> bytes:
    hint = "Make them with: p2pmodel control certificates DIR"
    secret = path.suffix == ".key"
    return read_secret(path, MAX_PEM_BYTES, "private key" if secret else "certificate", hint, secret=secret)
