"""Connections of a private network: everything under a pre-shared key, from the first byte on.

As py-libp2p 0.8.1's own class does it (Salsa20, with a nonce of 8 bytes for each direction), which cannot be used: it
lacks half of what a connection is asked, such as where it comes from, and takes a nonce that arrives in two pieces for
the end. The cipher only keeps strangers out; Noise, inside of it, is what authenticates and encrypts.
"""

import os

import trio
from Crypto.Cipher import Salsa20
from libp2p.abc import IRawConnection
from libp2p.network import swarm
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection

NONCE_BYTES = 8


class ProtectedConnection(RawConnection):
    def __init__(self, inner: RawConnection, psk: bytes) -> None:
        """psk: 32 bytes."""
        super().__init__(inner.stream, inner.is_initiator, inner.get_connection_type(), inner.get_transport_addresses())
        self._psk = psk
        self._sending = trio.Lock()
        self._outgoing: Salsa20.Salsa20Cipher | None = None
        self._incoming: Salsa20.Salsa20Cipher | None = None

    async def write(self, data: bytes) -> None:
        async with self._sending:
            if self._outgoing is None:
                nonce = os.urandom(NONCE_BYTES)
                self._outgoing = Salsa20.new(key=self._psk, nonce=nonce)
                data = nonce + self._outgoing.encrypt(data)
            else:
                data = self._outgoing.encrypt(data)
            await super().write(data)

    async def read(self, n: int | None = None) -> bytes:
        """For one reader, as every connection."""
        if self._incoming is None:
            nonce = b""
            while len(nonce) < NONCE_BYTES:
                piece = await super().read(NONCE_BYTES - len(nonce))
                if not piece:
                    raise RawConnError("closed before its nonce")
                nonce += piece
            self._incoming = Salsa20.new(key=self._psk, nonce=nonce)
        return self._incoming.decrypt(await super().read(n))


def protect_connections() -> None:
    """From now on the hosts of this process that have a pre-shared key use this class."""
    swarm.new_protected_conn = _protect  # type: ignore[assignment, attr-defined]


def _protect(inner: IRawConnection, psk: str) -> ProtectedConnection:
    assert isinstance(inner, RawConnection), "only TCP is listened on and dialled"
    return ProtectedConnection(inner, bytes.fromhex(psk))
