"""Blobs of named tensors, in the safetensors format (https://huggingface.co/docs/safetensors/#format).

    u64 header length · JSON header, padded with blanks to 8 bytes · raw little-endian data without gaps

`pack` writes one byte string for one set of tensors: larger element types first, so that everything is aligned, then
by name. `unpack` trusts nothing: it takes any valid safetensors file, and allocates no more than the bytes it was
given.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _CODES}
Raw = bytes | bytearray | memoryview
MAX_TENSORS = 100_000
MAX_EXTENT = 1 << 48
_CACHED_HEADER_BYTES = 1 << 16


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Raises ValueError for an element type that a blob cannot hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name}: a blob cannot hold {tensor.dtype}")
    header: dict[str, object] = {}
    parts: list[bytes] = []
    at = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


class Tensors(dict[str, Tensor]):
    """What `unpack` returns. `flat` is all of them as one float32 vector in the order of their names, without a copy,
    when they are float32 and the blob is laid out as `pack` does; `places` then says (name, shape) for each."""

    flat: Tensor | None = None
    places: tuple[tuple[str, tuple[int, ...]], ...] = ()


def unpack(raw: Raw, slots: Sequence[Slot] | None, limit: int) -> Tensors:
    """The tensors in `raw`, sorted by name: views of it where it is `mapped`, and else of one copy.

    slots: what may be in it, with the shape and dtype of each; None takes whatever there is. limit: bytes.
    Raises Rejected("size" | "schema" | "shape" | "finite").
    """
    if len(raw) > limit:
        raise Rejected("size", f"A blob of {len(raw)} bytes is over the limit of {limit}.")
    view = memoryview(raw)
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > len(view) - 8:
        raise Rejected("schema", "These bytes are no safetensors blob.")
    parse = _cached_layout if length <= _CACHED_HEADER_BYTES else _layout
    layout = parse(bytes(view[8 : 8 + length]), len(view) - 8 - length)
    if slots is not None:
        _check(layout, slots)
    data = np.frombuffer(view, np.uint8, offset=8 + length)
    if view.readonly or not isinstance(raw, memoryview) or (layout.flat and data.ctypes.data % 4):
        data = data.copy()
    tensors = _flat(layout, data) if layout.flat else _separate(layout, torch.from_numpy(data))
    if not _finite(tensors):
        raise Rejected("finite", "The blob holds values that are not finite.")
    return tensors


def mapped(path: Path) -> memoryview:
    """A file's bytes, read where they are looked at. Nothing is ever written to it. Raises OSError."""
    size = path.stat().st_size
    if not size:
        return memoryview(bytearray())
    # Python's own map keeps a file descriptor open, of which there are fewer than patches.
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().data
    except (RuntimeError, ValueError):  # a file system that maps nothing, or a name that is no UTF-8
        return memoryview(bytearray(path.read_bytes()))


def names(raw: Raw) -> frozenset[str]:
    """Of the tensors that a blob says it holds; none when it is no blob."""
    layout = _layout_of(raw)
    return frozenset() if layout is None else frozenset(layout.names)


def is_aligned(raw: Raw) -> bool:
    """Whether every tensor begins at a multiple of its element size, as `pack` and safetensors write them, so that a
    mapped blob need not be copied. Of what is no blob nothing is said."""
    layout = _layout_of(raw)
    if layout is None:
        return True
    header = int.from_bytes(raw[:8], "little")
    return not any((header + begin) % dtype.itemsize for _, dtype, _, begin, _ in layout.entries)


def _layout_of(raw: Raw) -> "_Layout | None":
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > len(raw) - 8:
        return None
    parse = _cached_layout if length <= _CACHED_HEADER_BYTES else _layout
    try:
        return parse(bytes(raw[8 : 8 + length]), len(raw) - 8 - length)
    except Rejected:
        return None


@dataclass(frozen=True)
class _Layout:
    """(name, dtype, shape, begin, end) of every tensor, in the order of the data, and what follows from them."""

    entries: tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
    flat: bool
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    places: tuple[tuple[str, tuple[int, ...]], ...]
    not_vectors: tuple[tuple[str, tuple[int, ...]], ...]


def _flat(layout: _Layout, data: NDArray[np.uint8]) -> Tensors:
    flat = torch.from_numpy(data.view(np.float32))
    parts = flat.split_with_sizes(layout.sizes)
    tensors = Tensors(zip(layout.names, parts, strict=True))
    for name, shape in layout.not_vectors:
        tensors[name] = tensors[name].view(shape)
    tensors.flat, tensors.places = flat, layout.places
    return tensors


def _separate(layout: _Layout, data: Tensor) -> Tensors:
    tensors = Tensors()
    for name, dtype, shape, begin, end in sorted(layout.entries):
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        part = data[begin:end]
        # A view has to begin at a multiple of its element size.
        part = part.clone() if part.data_ptr() % dtype.itemsize or begin % dtype.itemsize else part
        tensors[name] = part.view(dtype).view(shape)
    return tensors


def _finite(tensors: Tensors) -> bool:
    if tensors.flat is not None:
        return bool(np.isfinite(tensors.flat.numpy()).all())
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


def _layout(header: bytes, size: int) -> _Layout:
    try:
        raw_entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw_entries.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw_entries.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Rejected("schema", f"The header of a blob is malformed: {error}.") from None
    if len(entries) > MAX_TENSORS:
        raise Rejected("schema", f"A blob holds at most {MAX_TENSORS} tensors.")
    layout: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].data_offsets, item[0])):
        begin, end = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        # Beside a zero, other sizes could be anything: they take no bytes, but PyTorch's strides would overflow.
        extent = prod(max(n, 1) for n in entry.shape[:8])
        if dtype is None or any(n < 0 for n in entry.shape) or len(entry.shape) > 8 or extent > MAX_EXTENT:
            raise Rejected("schema", f"Tensor {name[:64]!r} of a blob has an unknown dtype or shape.")
        if begin != at or end - begin != prod(entry.shape) * dtype.itemsize:
            raise Rejected("schema", f"Tensor {name[:64]!r} of a blob is not where its header says.")
        layout.append((name, dtype, tuple(entry.shape), begin, end))
        at = end
    if at != size:
        raise Rejected("schema", f"The tensors of a blob take {at} bytes, but it holds {size}.")
    names = [name for name, _, _, _, _ in layout]
    flat = (
        bool(layout)
        and names == sorted(names)
        and all(dtype == torch.float32 and begin < end for _, dtype, _, begin, end in layout)
    )
    places = tuple((name, shape) for name, _, shape, _, _ in layout)
    return _Layout(
        tuple(layout),
        flat,
        tuple(names),
        tuple(prod(shape) for _, shape in places),
        places,
        tuple(place for place in places if len(place[1]) != 1),
    )


_cached_layout = lru_cache(maxsize=64)(_layout)  # patches of one lineage differ in their data only


def _check(layout: _Layout, slots: Sequence[Slot]) -> None:
    known = {slot.name: slot for slot in slots}
    for name, dtype, shape, _, _ in layout.entries:
        slot = known.get(name)
        if slot is None:
            raise Rejected("schema", f"{name[:64]!r} is no slot of this model.")
        if shape != slot.shape or _NAMES[dtype] != slot.dtype:
            raise Rejected(
                "shape",
                f"Slot {name[:64]!r} is {slot.dtype} {list(slot.shape)}, but the blob has "
                f"{_NAMES[dtype]} {list(shape)}.",
            )
