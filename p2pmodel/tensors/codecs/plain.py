"""The numbers as they are."""

import torch
from torch import Tensor

from p2pmodel.domain.ports import Buffer


class PlainCodec:
    """Every number in one floating dtype."""

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
