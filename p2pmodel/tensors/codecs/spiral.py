"""A code for pairs of Gaussian numbers: points on a Fibonacci spiral, numbered from the centre, and Rice's code.

Point n lies at the angle n·π(3-√5) and the radius √(2(n + ½)/MEAN), in standard deviations: all cells of the plane
are alike, which is best where frequent numbers cost fewer bits. The area inside of a Gaussian pair's radius is
exponentially distributed, so n is geometrically, with the mean MEAN; for that Rice's code is the shortest, but for
some hundredths of a bit: the LOW_BITS low bits as they are, the rest in unary.

At 4.5 bits a number the mean squared error is 0.0029 of the variance. The best levels of equal length for single
numbers (Lloyd-Max, 22 levels) give 0.0052.
"""

import math
from functools import cache

import numpy as np

from p2pmodel.tensors.codecs.rows import Array

MEAN = 176.0
LOW_BITS = 7
POINTS = 1 << 12
CELLS, REACH = 256, 4.5
"""The plane's square [-reach, reach]² has cells² cells; of each is known which point is nearest to its centre."""
_LOW_MASK = (1 << LOW_BITS) - 1
_SHIFTS = np.arange(0, 8 * LOW_BITS, LOW_BITS, dtype=np.uint64)


@cache
def points() -> Array:
    """[POINTS] complex64: the two numbers of a pair."""
    number = np.arange(POINTS)
    radius = np.sqrt(2 * (number + 0.5) / MEAN)
    spiral: Array = (radius * np.exp(1j * number * (math.pi * (3 - math.sqrt(5))))).astype(np.complex64)
    return spiral


@cache
def _nearest() -> Array:
    """[cells²] uint16, by second number, then first."""
    x, y = points().real, points().imag
    centres = ((np.arange(CELLS) + 0.5) * (2 * REACH / CELLS) - REACH).astype(np.float32)
    found = []
    for height in centres:
        near = np.flatnonzero(np.abs(y - height) < 0.3)  # no cell of the spiral is wider
        distances = (centres[:, None] - x[near]) ** 2 + (height - y[near]) ** 2
        found.append(near[distances.argmin(axis=1)])
    nearest: Array = np.concatenate(found).astype(np.uint16)
    return nearest


def quantise(cells: Array) -> Array:
    """cells: [..., 2P] float32, standard deviations times CELLS / (2·REACH), pairs side by side -> [..., P] uint16."""
    cells = cells + np.float32(CELLS / 2)
    np.minimum(np.maximum(cells, np.float32(0), out=cells), np.float32(CELLS - 1), out=cells)
    numbers: Array = _nearest().take(cells.astype(np.uint8).view(np.uint16))
    return numbers


def restore(numbers: Array) -> Array:
    """[..., P] below POINTS -> [..., 2P] float32."""
    return points().take(numbers).view(np.float32)


def low_bytes(pairs: int) -> int:
    return pairs * LOW_BITS // 8


def unary_bytes(pairs: int) -> int:
    """Two bits a pair, of which some are to spare: the sum of a token's numbers hardly varies."""
    return pairs // 4 + 1


def ends(numbers: Array) -> Array:
    """[T, P] -> [T, P] int64: where the unary parts end. Each is as many zeros as it counts, and a one."""
    return np.cumsum((numbers >> LOW_BITS) + 1, axis=1, dtype=np.int64) - 1


def pack(numbers: Array, places: Array) -> tuple[Array, Array]:
    """numbers [T, P], P a multiple of 32; places: their `ends`, which have to fit -> [T, low_bytes], [T, unary_bytes]
    uint8. Eight low parts are a little-endian number of seven bytes."""
    tokens, pairs = numbers.shape
    parts = (numbers & _LOW_MASK).reshape(tokens, -1, 8).astype(np.uint64) << _SHIFTS
    low = np.bitwise_or.reduce(parts, axis=2).view(np.uint8).reshape(tokens, -1, 8)[:, :, :LOW_BITS]
    unary = np.zeros((tokens, 8 * unary_bytes(pairs)), np.uint8)
    unary.put(places + _starts(unary), 1)
    return low.reshape(tokens, -1), np.packbits(unary, axis=1, bitorder="little")


def unpack(low: Array, unary: Array) -> tuple[Array, Array]:
    """The inverse of `pack`: [T, P] int64, below POINTS whatever the bytes are; and which tokens' unary parts are no
    code, [T] bool."""
    tokens, pairs = len(low), low.shape[1] * 8 // LOW_BITS
    bits = np.unpackbits(unary, axis=1, bitorder="little")
    broken = bits.sum(axis=1) != pairs
    if broken.any():
        bits[broken] = np.arange(bits.shape[1]) < pairs
    places = np.flatnonzero(bits).reshape(tokens, pairs)
    numbers = places - 1
    numbers[:, 1:] -= places[:, :-1]
    numbers[:, :1] -= _starts(bits) - 1
    np.minimum(numbers, (POINTS >> LOW_BITS) - 1, out=numbers)
    numbers <<= LOW_BITS
    parts = np.zeros((tokens, pairs // 8, 8), np.uint8)
    parts[:, :, :LOW_BITS] = low.reshape(tokens, -1, LOW_BITS)
    numbers |= ((parts.view(np.uint64) >> _SHIFTS) & np.uint64(_LOW_MASK)).reshape(tokens, pairs).view(np.int64)
    return numbers, broken


def _starts(rows_of_bits: Array) -> Array:
    """Where each row begins in the array as a whole: [T, 1]."""
    return np.arange(0, rows_of_bits.size, rows_of_bits.shape[1])[:, None]
