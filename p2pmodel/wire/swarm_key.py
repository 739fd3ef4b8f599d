"""The key of a private swarm: 32 secret bytes that its members share, in the file format of libp2p's private networks
(https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md), as other tools make it too.

Two things are made of it: the pre-shared key of gossip's connections, and **passes**. A pass is a MAC over who calls,
who is called, by which protocol, and which of the two speaks. It goes over a connection on which both have proven their
PeerIds, so nobody else can use it: not whom it was shown to, nor who records it.
"""

import hashlib
import hmac
import re
import secrets

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import PeerId

KEY_BYTES = 32
PASS_BYTES = 32
MAX_FILE_BYTES = 1024

_HEADER = "/key/swarm/psk/1.0.0/"
_ENCODING = "/base16/"


class SwarmKey:
    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a swarm key has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._passes = self._derive("passes")

    @classmethod
    def generate(cls) -> "SwarmKey":
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_text(cls, raw: bytes, name: str) -> "SwarmKey":
        """From a file's bytes; `name` is what an error calls it. Raises InvalidInput."""
        hint = "Copy the whole file from a member, or make a new one: p2pmodel swarm-key new FILE"
        lines = raw[: MAX_FILE_BYTES + 1].decode("ascii", "replace").split()
        if len(raw) > MAX_FILE_BYTES or len(lines) != 3 or lines[:2] != [_HEADER, _ENCODING]:
            raise InvalidInput(f"{name} is not a swarm key.", hint)
        if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * KEY_BYTES}}}", lines[2]):
            raise InvalidInput(f"The swarm key in {name} is not {2 * KEY_BYTES} hexadecimal digits long.", hint)
        return cls(bytes.fromhex(lines[2]))

    def to_text(self) -> bytes:
        """What its file holds."""
        return f"{_HEADER}\n{_ENCODING}\n{self._secret.hex()}\n".encode()

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits to compare two files by; says nothing about the key."""
        return self._derive("fingerprint").hex()[:16]

    def gossip_psk(self) -> bytes:
        """32 bytes, for libp2p's private networks."""
        return self._derive("gossip")

    def call_pass(self, protocol: str, caller: PeerId, called: PeerId) -> bytes:
        """What the caller shows. PASS_BYTES long."""
        return self._pass("call", protocol, caller, called)

    def answer_pass(self, protocol: str, caller: PeerId, called: PeerId) -> bytes:
        """What the called one shows. PASS_BYTES long."""
        return self._pass("answer", protocol, caller, called)

    def _pass(self, role: str, protocol: str, caller: PeerId, called: PeerId) -> bytes:
        # None of the parts can hold a zero byte, so no two different calls make the same message.
        message = "\0".join((role, protocol, caller, called)).encode()
        return hmac.digest(self._passes, message, hashlib.sha256)

    def _derive(self, purpose: str) -> bytes:
        info = f"p2pmodel/swarm-key/{purpose}/1".encode()
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(self._secret)
