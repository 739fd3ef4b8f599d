"""Activation codecs: hidden states <-> the bytes of a frame.

A codec is named in every session's request, since both ends have to agree. Others are found by their name through the
entry point group `p2pmodel.codecs`, each a `Codec` object. Bytes are little-endian, as are the hosts.
"""

from functools import cache
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ports import Buffer

ENTRY_POINTS = "p2pmodel.codecs"


class Codec(Protocol):
    """Shapes: T tokens of width H."""

    @property
    def name(self) -> str: ...

    def size(self, tokens: int, width: int) -> int:
        """Bytes that `encode` makes of [1, tokens, width]."""

    def encode(self, hidden: Tensor) -> Buffer:
        """The bytes of `hidden` [1, T, H], of any floating dtype, on any device; a view of it where that can be."""

    def decode(self, body: Buffer, tokens: int, width: int) -> Tensor:
        """[1, tokens, width] on the CPU; a view of `body` where that can be. Expects `size(tokens, width)` bytes."""


class PlainCodec:
    """The numbers as they are, in one floating dtype."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype
        self._largest = torch.finfo(dtype).max

    def size(self, tokens: int, width: int) -> int:
        return tokens * width * self.dtype.itemsize

    def encode(self, hidden: Tensor) -> Buffer:
        hidden = hidden.detach()
        if torch.finfo(hidden.dtype).max > self._largest:
            # An activation beyond the range saturates: as infinity it would end the session.
            hidden = hidden.clamp(-self._largest, self._largest)
        plain = hidden.to("cpu", self.dtype).contiguous()
        return plain.view(-1).view(torch.uint8).numpy().data

    def decode(self, body: Buffer, tokens: int, width: int) -> Tensor:
        view = memoryview(body)
        # torch has no tensors that cannot be written to
        writable = bytearray(view) if view.readonly else view
        return torch.frombuffer(writable, dtype=self.dtype).view(1, tokens, width)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        PlainCodec("fp32", torch.float32),
        PlainCodec("bf16", torch.bfloat16),
        PlainCodec("fp16", torch.float16),
    )
}


def get_codec(name: str) -> Codec:
    """Raises InvalidInput, naming those that exist."""
    codec = CODECS.get(name) or _installed().get(name)
    if codec is None:
        known = ", ".join(sorted({*CODECS, *_installed()}))
        raise InvalidInput(f"There is no activation codec {name[:32]!r}.", f"Choose one of: {known}.")
    return codec


@cache
def _installed() -> dict[str, Codec]:
    return {entry.name: entry.load() for entry in entry_points(group=ENTRY_POINTS)}
