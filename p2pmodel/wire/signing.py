"""Ed25519 keys, the PeerId that is made of one, and signed records.

A record is the canonical encoding of `Signed`. The signature covers a prefix that names the protocol and the kind, so a
signature for one kind is never valid for another. The public key is read from the PeerId (libp2p's identity multihash
of the key's protobuf; https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).
"""

from dataclasses import dataclass
from typing import TypeVar

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pmodel.domain.errors import Rejected, StorageError
from p2pmodel.domain.ids import PeerId
from p2pmodel.wire import canonical

T = TypeVar("T")

_IDENTITY_MULTIHASH = b"\x00\x24\x08\x01\x12\x20"  # identity code, 36 bytes; protobuf: type Ed25519, data of 32 bytes
_PRIVATE_PROTOBUF = b"\x08\x01\x12\x40"  # protobuf: type Ed25519, data of 64 bytes (seed, public key)
RECORD_OVERHEAD = 512
"""More than what a record adds to its body."""


@dataclass(frozen=True)
class Signed:
    kind: str
    body: bytes
    signer: PeerId
    signature: bytes


class Key:
    """A peer's private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.peer = PeerId(base58.b58encode(_IDENTITY_MULTIHASH + private.public_key().public_bytes_raw()).decode())

    @classmethod
    def generate(cls) -> "Key":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_libp2p(cls, raw: bytes) -> "Key":
        """From a libp2p private key file. Raises StorageError when it is none of Ed25519."""
        if len(raw) != 68 or raw[:4] != _PRIVATE_PROTOBUF:
            raise StorageError("The key file is not an Ed25519 key in libp2p's format.", "Restore it from a backup.")
        key = cls(Ed25519PrivateKey.from_private_bytes(raw[4:36]))
        if key.to_libp2p() != raw:
            raise StorageError("The key file's two halves do not match.", "Restore it from a backup.")
        return key

    def to_libp2p(self) -> bytes:
        """Protobuf `PrivateKey{type: Ed25519, data: seed ‖ public}`, 68 bytes: the file that the P2P daemon reads."""
        return _PRIVATE_PROTOBUF + self._private.private_bytes_raw() + self._private.public_key().public_bytes_raw()

    def derive(self, purpose: str) -> "Key":
        """Another key that only this one's owner can make (HKDF-SHA256)."""
        seed = HKDF(SHA256(), 32, salt=None, info=f"p2pmodel/{purpose}/1".encode()).derive(
            self._private.private_bytes_raw()
        )
        return Key(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, kind: str, noun: object) -> bytes:
        """The record: canonical bytes of a Signed around the noun's canonical bytes."""
        body = canonical.encode(noun)
        return canonical.encode(Signed(kind, body, self.peer, self._private.sign(_message(kind, body))))

    def sign_envelope(self, payload_type: str, payload: bytes) -> bytes:
        """The signature of a DSSE envelope around the payload; never valid for a record, nor a record's for it."""
        return self._private.sign(_envelope(payload_type, payload))


def verify_envelope(peer: PeerId, payload_type: str, payload: bytes, signature: bytes) -> None:
    """Raises Rejected("signature")."""
    try:
        public_key(peer).verify(signature, _envelope(payload_type, payload))
    except InvalidSignature:
        raise Rejected("signature", f"The signature of the envelope is not that of {peer}.") from None


def public_key(peer: PeerId) -> Ed25519PublicKey:
    """Raises Rejected("signature") when the id is not that of an Ed25519 key."""
    try:
        raw = base58.b58decode(peer)
    except ValueError:
        raw = b""
    if len(raw) != 38 or not raw.startswith(_IDENTITY_MULTIHASH):
        raise Rejected("signature", "The signer's id is not that of an Ed25519 key.")
    return Ed25519PublicKey.from_public_bytes(raw[6:])


def open_record(record: bytes, kind: str, noun: type[T], limit: int) -> tuple[T, PeerId]:
    """The noun inside a record, and who signed it.

    Raises Rejected("size" | "schema" | "canonical" | "kind" | "signature"); size is checked first, the signature before
    the body is decoded.
    """
    signed = canonical.decode(record, Signed, limit + RECORD_OVERHEAD)
    if signed.kind != kind:
        raise Rejected("kind", f"This is a record of kind {signed.kind[:32]!r}, not {kind!r}.")
    try:
        public_key(signed.signer).verify(signed.signature, _message(kind, signed.body))
    except InvalidSignature:
        raise Rejected("signature", f"The signature of this {kind} is not that of {signed.signer}.") from None
    return canonical.decode(signed.body, noun, limit), signed.signer


def _message(kind: str, body: bytes) -> bytes:
    return b"p2pmodel/1/" + kind.encode() + b"\x00" + body


def _envelope(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding (https://github.com/secure-systems-lab/dsse/blob/master/protocol.md)."""
    name = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)
