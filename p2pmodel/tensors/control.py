"""A contributor's mean gradient over its training, in four bits a value: its control variate.

It takes out of the next round what its data have that others' have not (SCAFFOLD: Karimireddy et al., 2020,
arXiv:1910.06378).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.tensors import blob, fourbit
from p2pmodel.tensors.blob import Raw
from p2pmodel.tensors.changes import Change, EndToEnd, Places

LARGEST = torch.finfo(torch.bfloat16).max
"""Of any value: the mean of a round's control variates is written in bfloat16."""


def write(gradient: Mapping[str, Tensor], error: Mapping[str, Tensor] | None = None) -> tuple[bytes, dict[str, Tensor]]:
    """(the blob, the error of its rounding). gradient: by parameter, float32; error: what the blob before left over."""
    encoded, left = fourbit.encode(gradient, error)
    return blob.pack(encoded), left


def read(control: Raw, places: Places, limit: int) -> EndToEnd:
    """By parameter, float32. Raises Rejected("size" | "schema" | "shape" | "finite")."""
    gradient = fourbit.Decoded(control, places, limit)
    if any(tensor.numel() and float(tensor.abs().max()) > LARGEST for tensor in gradient.values()):
        raise Rejected("finite", f"The control variate has values beyond {LARGEST:.3g}, which no gradient has.")
    return gradient


def places(adapter: Raw, change: Change, limit: int) -> Places:
    """Of the parameters that a patch was trained in, which its gradient is of. change: what the adapter blob holds."""
    if fourbit.holds(adapter):
        return tuple((slot, change.shape(slot)) for slot in sorted(change.values))
    return parameters(blob.unpack(adapter, None, limit))


def parameters(adapter: Mapping[str, Tensor]) -> Places:
    """What is float32 in an adapter is what was trained."""
    return tuple((n, tuple(t.shape)) for n, t in sorted(adapter.items()) if t.dtype == torch.float32)
