"""Who may ask: keys, and what keeps other people's web pages from using a gateway that listens on this machine."""

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.gateway.failures import ApiError

MAX_KEY_FILE_BYTES = 1 << 20
MIN_KEY_CHARACTERS = 16

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Keys:
    """Only their hashes are kept, so no key can end up in a log or a traceback."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = tuple(_hash(key) for key in keys)

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """A file with a key a line; empty lines and lines that begin with # count for nothing. Raises NotFound,
        InvalidInput."""
        try:
            with path.open("rb") as file:
                text = file.read(MAX_KEY_FILE_BYTES + 1).decode("ascii")
        except OSError as error:
            raise NotFound(f"The key file {path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise InvalidInput(f"The key file {path} has something else than ASCII characters.") from None
        if len(text) > MAX_KEY_FILE_BYTES:
            raise InvalidInput(f"The key file {path} has more than {MAX_KEY_FILE_BYTES} bytes.")
        keys = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        if not keys or any(len(key) < MIN_KEY_CHARACTERS or " " in key for key in keys):
            raise InvalidInput(
                f"The key file {path} has to hold keys of at least {MIN_KEY_CHARACTERS} characters, one a line.",
                "Make one with: openssl rand -hex 24",
            )
        return cls(keys)

    def demand(self, request: web.Request) -> None:
        """Raises ApiError 401. All keys are compared, each in constant time."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        wanted = _hash(given.strip())
        matches = [hmac.compare_digest(wanted, known) for known in self._hashes]
        if scheme.lower() != "bearer" or not any(matches):
            what = "This is not a key of this gateway." if given else "A key is needed: Authorization: Bearer KEY"
            raise ApiError(401, what, code="invalid_api_key")


def demand_own_page(request: web.Request, host: str) -> None:
    """On a loopback address without keys, what protects this machine is that only its own programs can ask. A web page
    elsewhere must not: it could have its name resolved to this address, or post to it. Raises ApiError 403."""
    if is_loopback(host) and not _names_loopback(request.host):
        raise ApiError(403, "This gateway is for this machine only.", code="foreign_host")
    foreign = request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
    if foreign and request.headers.get("Sec-Fetch-Mode") != "navigate":
        raise ApiError(403, "Pages of other sites cannot use this gateway.", code="foreign_page")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names_loopback(host: str) -> bool:
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
