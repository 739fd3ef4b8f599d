"""A few numbers of each token, those of the largest magnitude, kept beside its coarse ones.

In transformers a handful of channels carry values tens to thousands of times the others' (Dettmers et al., 2022:
LLM.int8(); Sun et al., 2024: Massive activations). Left among the others, they alone would set the others' step.

A token with k outliers has 1 + 2k words of 16 bits: the magnitude of the largest (bfloat16, whose range is
float32's), k channels (uint16), k values as parts of that magnitude (float16).
"""

from typing import NamedTuple

import numpy as np

from p2pmodel.tensors.codecs import rows
from p2pmodel.tensors.codecs.rows import Array

_SMALLEST = np.float32(1e-30)


class Split(NamedTuple):
    """words: [T, 1 + 2k] integers, in parts, of which the low 16 bits count; rest: [T, H] float32, zero where the
    outliers were; largest: [T, 1], magnitude of the rest."""

    words: tuple[Array, ...]
    rest: Array
    largest: Array


def word_count(count: int) -> int:
    return 1 + 2 * count


def split(hidden: Array, count: int) -> Split:
    """hidden: [T, H] float32, count < H <= 65,536."""
    magnitudes = np.abs(hidden)
    first = hidden.shape[1] - count - 1
    # What is no number is sorted behind the largest.
    channels = magnitudes.argpartition(first, axis=1)[:, first:]
    flat = _flat(channels, hidden)
    largest = magnitudes.take(flat)
    peak = rows.to_bfloat16(np.maximum(largest.max(axis=1, keepdims=True), _SMALLEST))
    flat = flat[:, 1:]
    values = (hidden.take(flat) / rows.from_bfloat16(peak)).astype(np.float16)
    rest = hidden.copy()
    rest.put(flat, 0.0)
    return Split((peak, channels[:, 1:], values.view(np.uint16)), rest, largest[:, :1])


def restore(rest: Array, words: Array) -> None:
    """Puts the outliers into `rest` [T, H]. Channels that do not exist become the last one."""
    count = words.shape[1] // 2
    channels = np.minimum(words[:, 1 : 1 + count], rest.shape[1] - 1)
    rest.put(_flat(channels, rest), words[:, 1 + count :].view(np.float16) * rows.from_bfloat16(words[:, :1]))


def _flat(channels: Array, rest: Array) -> Array:
    """Where they lie in the array as a whole: [T, k] int64."""
    tokens, width = rest.shape
    return channels + np.arange(0, tokens * width, width)[:, None] if tokens > 1 else channels
