"""Tensors <-> rows of bytes, one a token, so that the bytes of some tokens one after the other are the bytes of all.

In between numpy computes: for one token, which is what decoding sends, the cost of a codec is that of calling its
operations, and numpy's cost half of torch's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pmodel.domain.ports import Buffer

Array = NDArray[Any]

TOKENS_AT_ONCE = 32
"""So that what lies between two steps of a codec stays in the cache."""


def of(hidden: Tensor) -> Array:
    """[1, T, H] of any floating dtype, on any device -> [T, H] float32; not to be written to."""
    return hidden.detach().to("cpu", torch.float32).numpy().reshape(-1, hidden.shape[-1])


def side_by_side(*parts: Array) -> Array:
    """parts: [T, N] each, contiguous, of any dtypes -> [T, bytes of a row] uint8."""
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)


def to_buffer(encoded: Callable[[Array], Array], states: Array) -> Buffer:
    """encoded: of some of the `states` [T, H], the rows, [T, bytes of a row] uint8."""
    with np.errstate(all="ignore"):  # what is no number becomes none in the decoder
        if len(states) <= TOKENS_AT_ONCE:
            return encoded(states).reshape(-1).data
        parts = [encoded(states[at : at + TOKENS_AT_ONCE]) for at in range(0, len(states), TOKENS_AT_ONCE)]
        return np.concatenate(parts).reshape(-1).data


def from_buffer(body: Buffer, tokens: int) -> Array:
    """[tokens, bytes of a row] uint8, a view."""
    return np.frombuffer(body, np.uint8).reshape(tokens, -1)


def part(rows: Array, start: int, end: int, dtype: type[np.generic]) -> Array:
    """The items between two bytes of every row: [T, N], a copy, as rows need not be aligned."""
    return rows[:, start:end].copy().view(dtype)


def to_tensor(decoded: Callable[[Array], Array], coded: Array, width: int) -> Tensor:
    """[1, T, width] float32. decoded: of some of the rows, the states, [T, width] float32."""
    states = np.empty((1, len(coded), width), np.float32)
    with np.errstate(all="ignore"):
        for at in range(0, len(coded), TOKENS_AT_ONCE):
            states[0, at : at + TOKENS_AT_ONCE] = decoded(coded[at : at + TOKENS_AT_ONCE])
    return torch.from_numpy(states)


def to_bfloat16(numbers: Array) -> Array:
    """[T, N] float32, contiguous -> [T, N] uint16, a view. Rounds towards zero; what is not finite stays so."""
    return numbers.view(np.uint16)[:, 1::2]


def from_bfloat16(words: Array) -> Array:
    return np.left_shift(words, 16, dtype=np.uint32).view(np.float32)


def to_words(*parts: Array) -> Array:
    """parts: [T, N] integers, side by side in every row: uint16, their low 16 bits."""
    return np.concatenate(parts, axis=1, dtype=np.uint16, casting="unsafe")
