"""8 bits a number, with a step per token, and the token's outliers beside them.

A row: the step (float32), the outliers' words, then one int8 a channel.
"""

from functools import partial

import numpy as np
from torch import Tensor

from p2pmodel.domain.ports import Buffer
from p2pmodel.tensors.codecs import outliers, rows
from p2pmodel.tensors.codecs.rows import Array

_CHANNELS_AN_OUTLIER = 64
_LEVELS = np.nextafter(np.float32(127), np.float32(128))
"""A hair more than there are, so that 127 steps are never more than the number that set them: it may be the largest."""
_SMALLEST = np.float32(1e-37)
_STEP_BYTES = 4


class Int8Codec:
    """At most 1.09 bytes a number from width 256 on."""

    name = "int8"

    def size(self, tokens: int, width: int) -> int:
        return tokens * (_STEP_BYTES + 2 * outliers.word_count(width // _CHANNELS_AN_OUTLIER) + width)

    def encode(self, hidden: Tensor) -> Buffer:
        return rows.to_buffer(_encoded, rows.of(hidden))

    def decode(self, body: Buffer, tokens: int, width: int) -> Tensor:
        return rows.to_tensor(partial(_decoded, width), rows.from_buffer(body, tokens), width)


def _encoded(states: Array) -> Array:
    kept = outliers.split(states, states.shape[1] // _CHANNELS_AN_OUTLIER)
    step = np.maximum(kept.largest / _LEVELS, _SMALLEST)
    codes = np.divide(kept.rest, step, out=kept.rest)
    return rows.side_by_side(step, rows.to_words(*kept.words), np.rint(codes, out=codes).astype(np.int8))


def _decoded(width: int, coded: Array) -> Array:
    words = coded.shape[1] - width
    states = coded[:, words:].view(np.int8) * rows.part(coded, 0, _STEP_BYTES, np.float32)
    outliers.restore(states, rows.part(coded, _STEP_BYTES, words, np.uint16))
    return states
