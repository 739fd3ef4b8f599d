"""A peer's key under a passphrase, to be moved to another machine or kept as a backup: JSON that people can look at.

Scrypt makes the key of ChaCha20-Poly1305 from the passphrase (RFC 7914, RFC 8439); all else in the file is
authenticated with it. A guess costs 128 MiB and about half a second.
"""

import secrets
import unicodedata

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from p2pmodel.domain.errors import InvalidInput, StorageError
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key

FORMAT = "p2pmodel-identity/1"
MAX_FILE_BYTES = 4096
MIN_PASSPHRASE = 10
"""Characters."""

COST, MAX_COST = 1 << 17, 1 << 20
"""Scrypt's N; its r is 8 and its p 1, so N KiB of memory. What somebody else's file may ask for ends at 1 GiB."""

_SALT_BYTES, _NONCE_BYTES = 16, 12


class SealedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file, with its bytes in base64. peer: of the key inside, so that files can be told apart."""

    format: str
    peer: str
    scrypt_n: int
    scrypt_salt: bytes
    nonce: bytes
    sealed: bytes

    @property
    def head(self) -> bytes:
        return canonical.encode([self.format, self.peer, self.scrypt_n, self.scrypt_salt, self.nonce])


def seal(key: Key, passphrase: str, cost: int = COST) -> bytes:
    """The file's bytes. Raises InvalidInput for a passphrase that is too short."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise InvalidInput(f"The passphrase has less than {MIN_PASSPHRASE} characters.", "Some random words do well.")
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    empty = SealedKey(FORMAT, key.peer, cost, salt, nonce, b"")
    sealed = _cipher(empty, passphrase).encrypt(nonce, key.to_libp2p(), empty.head)
    whole = msgspec.structs.replace(empty, sealed=sealed)
    return msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n"


def read(raw: bytes, name: str) -> SealedKey:
    """What a file says of itself, unverified. name: what an error calls it. Raises InvalidInput."""
    try:
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError
        found = msgspec.json.decode(raw, type=SealedKey)
        if found.format != FORMAT or not 1 < found.scrypt_n <= MAX_COST or found.scrypt_n & (found.scrypt_n - 1):
            raise ValueError
        if len(found.scrypt_salt) != _SALT_BYTES or len(found.nonce) != _NONCE_BYTES:
            raise ValueError
    except ValueError:  # msgspec's errors are among them
        raise InvalidInput(f"{name} is no exported identity.", "Make one with: p2pmodel id export") from None
    return found


def unseal(file: SealedKey, passphrase: str, name: str) -> Key:
    """Raises InvalidInput for a wrong passphrase, or a file that was changed."""
    try:
        key = Key.from_libp2p(_cipher(file, passphrase).decrypt(file.nonce, file.sealed, file.head))
    except InvalidTag:
        raise InvalidInput(f"The passphrase does not open {name}, or the file is damaged.", "Try again.") from None
    except StorageError as error:
        raise InvalidInput(f"{name} holds no key: {error.message}") from None
    if key.peer != file.peer:
        raise InvalidInput(f"{name} holds another key than it says.")
    return key


def _cipher(file: SealedKey, passphrase: str) -> ChaCha20Poly1305:
    """Passphrases are normalised (NFKC): keyboards write the same letter in different ways."""
    text = unicodedata.normalize("NFKC", passphrase).encode()
    return ChaCha20Poly1305(Scrypt(file.scrypt_salt, 32, n=file.scrypt_n, r=8, p=1).derive(text))
