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
from p2pmodel.tensors.codecs.hadamard import HadamardCodec
from p2pmodel.tensors.codecs.int8 import Int8Codec
from p2pmodel.tensors.codecs.plain import PlainCodec

__all__ = ["CODECS", "DEFAULT_CODEC", "ENTRY_POINTS", "Codec", "PlainCodec", "get_codec"]

ENTRY_POINTS = "p2pmodel.codecs"


class Codec(Protocol):
    """Shapes: T tokens of width H. A token's bytes depend on that token alone."""

    @property
    def name(self) -> str: ...

    def size(self, tokens: int, width: int) -> int:
        """Bytes that `encode` makes of [1, tokens, width]: tokens times those of one."""

    def encode(self, hidden: Tensor) -> Buffer:
        """The bytes of `hidden` [1, T, H], of any floating dtype, on any device; a view of it where that can be."""

    def decode(self, body: Buffer, tokens: int, width: int) -> Tensor:
        """[1, tokens, width] on the CPU; a view of `body` where that can be. Expects `size(tokens, width)` bytes."""


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        PlainCodec("fp32", torch.float32),
        PlainCodec("bf16", torch.bfloat16),
        PlainCodec("fp16", torch.float16),
        Int8Codec(),
        HadamardCodec(),
    )
}
DEFAULT_CODEC: str = Int8Codec.name
"""The smallest that costs no quality: scripts/bench/activation_codecs.py."""


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
