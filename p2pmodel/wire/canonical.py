"""Canonical msgpack: one byte string for one value, so that digests and signatures mean something.

Dataclasses are maps with sorted keys, tuples arrays, integers in their shortest form, floats 64 bits. Decoding checks
the schema (types, then the noun's own `__post_init__`) and that the bytes are the canonical ones.
"""

import dataclasses
import hashlib
from typing import Any, TypeVar

import msgspec

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder(order="deterministic")


def encode(value: Any) -> bytes:
    """Canonical bytes of a noun, or of any value made of maps, lists, text, bytes and numbers."""
    return _encoder.encode(msgspec.to_builtins(value, builtin_types=(bytes, memoryview)))


def decode(raw: bytes | bytearray | memoryview, kind: type[T], limit: int) -> T:
    """The noun of type `kind` in `raw`. Raises Rejected("size" | "schema" | "canonical")."""
    if len(raw) > limit:
        raise Rejected("size", f"{kind.__name__} of {len(raw)} bytes is over the limit of {limit}.")
    try:
        value = msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Rejected("schema", f"These bytes are no valid {kind.__name__}: {error}.") from None
    _spell_out(value)
    if encode(value) != bytes(raw):
        raise Rejected("canonical", f"The {kind.__name__} is not encoded canonically.")
    return value


def _spell_out(value: Any) -> None:
    """msgspec leaves a field that was not sent to its class, and would not send it either: two spellings of a noun."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            member = getattr(value, field.name)
            object.__setattr__(value, field.name, member)
            _spell_out(member)
    elif isinstance(value, tuple | list):
        for member in value:
            _spell_out(member)


def digest(raw: bytes | bytearray | memoryview) -> Digest:
    return Digest(hashlib.sha256(raw).hexdigest())


def blob_ref(raw: bytes) -> BlobRef:
    return BlobRef(digest(raw), len(raw))
