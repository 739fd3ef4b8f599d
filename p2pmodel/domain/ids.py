"""Names of things: peers by key, everything else by content."""

import re
from typing import NewType

PeerId = NewType("PeerId", str)
"""libp2p PeerId of an Ed25519 key, base58 (`12D3KooW…`); the public key can be read from it."""

Digest = NewType("Digest", str)
"""SHA-256 of some bytes: 64 lower-case hexadecimal digits."""

ModelId = Digest
"""Digest of the signed Manifest's record."""

PatchId = Digest
"""Digest of the signed patch header's record."""

VersionId = Digest
"""Digest of the canonical bytes of the `Candidate` that became the version; the model id for the base version."""

LEAST_DIGITS = 4
"""Of the beginning of an id that people may give in its place."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PEER = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")


def check_digest(value: str, field: str) -> None:
    if not _DIGEST.fullmatch(value):
        raise ValueError(f"{field} is not a SHA-256 digest")


def check_peer(value: str, field: str) -> None:
    if not _PEER.fullmatch(value):
        raise ValueError(f"{field} is not the id of an Ed25519 peer")


def abbreviates(text: str, digest: str) -> bool:
    """Whether what people give is the digest, or enough of its beginning."""
    return len(text) >= LEAST_DIGITS and digest.startswith(text)


def short(digest: str) -> str:
    """The form that people see: 10 digits are enough to tell things of one lineage apart."""
    return digest[:10]
