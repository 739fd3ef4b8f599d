"""4.5 bits a number: a randomised rotation makes every token look Gaussian, and a code for Gaussians does the rest.

A token is padded with zeros to a multiple of 64 channels. It falls into blocks of b, the largest power of two up to
256 that divides the padded width; each is multiplied by random signs, and by a Hadamard matrix. Signs are the bits,
lowest first, of SHAKE-256("p2pmodel h4"): +1 for 0, -1 for 1. (Random rotations before coarse rounding: Ashkboos et
al., 2024: QuaRot.)

The rotation is exact: what goes in is rounded to 14-bit integers, so that all sums fit float32's 24 bits in whatever
order they are taken. So a token has the same bytes alone and among others, and whatever the linear algebra library.

A row: scales (bfloat16, the standard deviation of each group of blocks; a group is as long as fits 512 numbers and
divides the width), the outliers' words, the low bits of the pairs' codes, then their unary parts. There are as many
outliers as fit 0.6 bytes a number. A token whose unary parts do not fit is taken for one of larger scales until they
do.
"""

import hashlib
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from p2pmodel.domain.ports import Buffer
from p2pmodel.tensors.codecs import outliers, rows, spiral
from p2pmodel.tensors.codecs.rows import Array

_PADDING, _MAX_BLOCK, _MAX_GROUP = 64, 256, 512
_LEVELS = np.float32((1 << 13) - 1)
_SMALLEST, _LARGEST = np.float32(1e-30), np.float32(1e36)
"""Of magnitudes, and of scales: their reciprocals, and the sums that a block can give, have to be finite."""
_COARSER = 2
"""Added to a bfloat16: 0.8 to 1.6 %."""
_FLOOR = np.float32(2**-6)
"""Below the standard deviation, in units, of any group that is not all zeros."""
_CENTRED = np.float32(1 + 2**-9)
"""Rounding to bfloat16 is towards zero; after this factor it errs as often upwards."""


class _Layout(NamedTuple):
    """Of one width. groups and outliers: how many a token has; head, unary and row: bytes before the codes, before
    their unary parts, and in all; capacity: bits for the unary parts; signs: [padded]; left, right: the Hadamard matrix
    of a block is their Kronecker product; norm: 1/√b; cells: of the spiral's plane, for a standard deviation, times
    norm."""

    padded: int
    groups: int
    outliers: int
    head: int
    unary: int
    row: int
    capacity: int
    signs: Array
    left: Array
    right: Array
    norm: np.float32
    cells: np.float32


@cache
def _layout(width: int) -> _Layout:
    padded = -(-width // _PADDING) * _PADDING
    block = min(padded & -padded, _MAX_BLOCK)
    blocks, pairs = padded // block, padded // 2
    groups = blocks // max(d for d in range(1, _MAX_GROUP // block + 1) if blocks % d == 0)
    codes = spiral.low_bytes(pairs) + spiral.unary_bytes(pairs)
    kept = max(0, width * 6 // 10 - codes - 2 * groups - 2) // 4
    head = 2 * (groups + outliers.word_count(kept))
    left = 1 << (block.bit_length() // 2)
    return _Layout(
        padded,
        groups,
        kept,
        head,
        head + spiral.low_bytes(pairs),
        head + codes,
        8 * spiral.unary_bytes(pairs),
        _signs(padded),
        _hadamard(left),
        _hadamard(block // left),
        np.float32(block**-0.5),
        np.float32(block**-0.5 * spiral.CELLS / (2 * spiral.REACH)),
    )


def _signs(count: int) -> Array:
    noise = np.frombuffer(hashlib.shake_256(b"p2pmodel h4").digest(count // 8), np.uint8)
    return 1 - 2 * np.unpackbits(noise, bitorder="little").astype(np.float32)


def _hadamard(order: int) -> Array:
    """Sylvester's, of entries ±1."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _rotate(numbers: Array, plan: _Layout) -> Array:
    """Every block times the Hadamard matrix, without its factor 1/√b. It is its own inverse, but for b."""
    blocks = numbers.reshape(-1, len(plan.left), len(plan.right))
    rotated: Array = np.matmul(plan.left, np.matmul(blocks, plan.right))
    return rotated


class HadamardCodec:
    """At most 0.6 bytes a number, at widths that are multiples of 64 from 256 on."""

    name = "h4"

    def size(self, tokens: int, width: int) -> int:
        return tokens * _layout(width).row

    def encode(self, hidden: Tensor) -> Buffer:
        return rows.to_buffer(partial(_encoded, _layout(hidden.shape[-1])), rows.of(hidden))

    def decode(self, body: Buffer, tokens: int, width: int) -> Tensor:
        return rows.to_tensor(partial(_decoded, _layout(width), width), rows.from_buffer(body, tokens), width)


def _encoded(plan: _Layout, states: Array) -> Array:
    """[T, H] float32 -> [T, plan.row] uint8."""
    kept = outliers.split(states, plan.outliers)
    tokens, width = states.shape
    rest = kept.rest if width == plan.padded else np.pad(kept.rest, ((0, 0), (0, plan.padded - width)))
    # fmax, so that a state that is none leaves these numbers: its scales say so.
    unit = np.minimum(np.fmax(kept.largest, _SMALLEST), _LARGEST) / _LEVELS
    rest *= 1 / unit
    np.minimum(np.maximum(np.rint(rest, out=rest), -_LEVELS, out=rest), _LEVELS, out=rest)
    exact = rest.reshape(tokens, plan.groups, -1).astype(np.float64)  # holds the sum of the squares, too
    variance = np.vecdot(exact, exact) / exact.shape[2]
    scales = rows.to_bfloat16(np.sqrt(variance).astype(np.float32) * (unit * _CENTRED))
    rest *= plan.signs
    rotated = _rotate(rest, plan).reshape(exact.shape)
    floor = unit * _FLOOR
    while True:
        factors = plan.cells * unit / np.fmax(rows.from_bfloat16(scales), floor)
        codes = spiral.quantise((rotated * factors[:, :, None]).reshape(tokens, -1))
        ends = spiral.ends(codes)
        last = ends[:, -1:]
        if last.max() < plan.capacity:
            return rows.side_by_side(rows.to_words(scales, *kept.words), *spiral.pack(codes, ends))
        rotated[~np.isfinite(variance).all(axis=1)] = 0
        scales = scales + (last >= plan.capacity) * np.uint16(_COARSER)


def _decoded(plan: _Layout, width: int, coded: Array) -> Array:
    """The inverse. A token whose codes are none becomes NaN."""
    words = rows.part(coded, 0, plan.head, np.uint16)
    codes, broken = spiral.unpack(coded[:, plan.head : plan.unary], coded[:, plan.unary :])
    scales = rows.from_bfloat16(words[:, : plan.groups]) * plan.norm
    scales[broken] = np.nan
    rotated = _rotate(spiral.restore(codes), plan).reshape(len(coded), plan.groups, -1)
    rotated *= scales[:, :, None]
    states = rotated.reshape(len(coded), -1)
    states *= plan.signs
    states = np.ascontiguousarray(states[:, :width])
    outliers.restore(states, words[:, plan.groups :])
    return states
