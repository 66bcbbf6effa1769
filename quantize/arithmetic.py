"""Quantization and dequantization of numpy arrays. Independent of graphs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
WEIGHT_LEVELS = 127
"""Weights in int8 are integers from -WEIGHT_LEVELS to WEIGHT_LEVELS."""
ACTIVATION_LEVELS = 127
"""Activations are uint8 around `ACTIVATION_ZERO`; the largest magnitude is this far from it."""
ACTIVATION_ZERO = 128
"""The uint8 that represents 0, in the middle of the range."""
POSITIVE_LEVELS = 255
"""The largest uint8 for activations that are never negative, whose zero is 0: those of the front end."""
NOTHING = 1e-30
"""Weights up to this magnitude are treated as zeros: their scale would be subnormal."""
INT4_ZEROS = (6, 7, 8, 9)
"""Zero point of a block of 4-bit weights, which are integers from 0 to 15."""


class Int8(NamedTuple):
    """A weight [in, out] as integers from -127 to 127 times the scale of their column.

    Attributes:
        integers: int8 [in, out].
        scale: float32 [out].
    """

    integers: npt.NDArray[np.int8]
    scale: Float


class Int4(NamedTuple):
    """A weight [in, out] in 4 bits, in blocks of rows. Each column has a scale, each of its blocks a step and a zero.

    A weight is (integer - zero) * step * scale. Without the scale it fits in 8 bits, in which native kernels multiply.

    Attributes:
        integers: uint8 [out, blocks, block_size / 2], the even row in the low half, as MatMulNBits reads them.
        steps: uint8 [out, blocks], the step in the low half and the zero in the high half.
        scale: float32 [out].
    """

    integers: npt.NDArray[np.uint8]
    steps: npt.NDArray[np.uint8]
    scale: Float


def int8_columns(weight: Float) -> Int8:
    """A weight [in, out] with one scale per column (output channel).

    x86 without VNNI multiplies rows 2k and 2k + 1 by two uint8 at once and adds the products in 16 bits, which hold
    255 * 128 but not 255 * 129. The scale therefore comes from the largest weight of the column or, if that is larger,
    from the largest sum of such a pair: two roundings turn 127 into at most 128. Weights of 7 bits would also work,
    with half as much error again; activations of 7 bits have the largest error.

    A column of zeros gets scale 1 and stays zero.
    """
    paired = len(weight) - len(weight) % 2
    sums = np.abs(weight[0:paired:2] + weight[1:paired:2]).max(axis=0, initial=0)
    return Int8(*_integers(weight, np.maximum(np.abs(weight).max(axis=0), sums)))


def int8_rows(weight: Float) -> tuple[npt.NDArray[np.int8], Float]:
    """Symmetric int8 with one scale per row, for embeddings: [rows, dim] to integers and scales [rows, 1].

    They are multiplied only by their scale, so there are no sums of pairs.
    """
    integers, scale = _integers(weight.T, np.abs(weight).max(axis=1))
    return np.ascontiguousarray(integers.T), scale[:, np.newaxis]


def _integers(weight: Float, largest: Float) -> tuple[npt.NDArray[np.int8], Float]:
    """Integers and scales of columns, in which `largest` becomes `WEIGHT_LEVELS`."""
    scale = np.where(largest > NOTHING, largest / WEIGHT_LEVELS, 1).astype(np.float32)
    return np.clip(np.rint(weight / scale), -WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8), scale


def int4_blocks(weight: Float, block_size: int) -> Int4:
    """A weight [in, out] in 4 bits; the last block is padded with zeros."""
    blocks = _blocks(weight, block_size)
    scale = int4_scale(weight, block_size)
    steps = int4_steps(blocks, scale[:, np.newaxis])
    return Int4(_packed(int4_integers(blocks, scale[:, np.newaxis, np.newaxis], steps[..., np.newaxis])), steps, scale)


def int4_scale(weight: Float, block_size: int) -> Float:
    """The scale of each column [out], with which no block of a weight [in, out] is clipped; 1 for columns of zeros."""
    ranges = np.min([_ranges(_blocks(weight, block_size), zero) for zero in INT4_ZEROS], axis=0)
    largest = ranges.max(axis=1)
    return np.where(largest > NOTHING, largest / _most(INT4_ZEROS[0]), 1).astype(np.float32)


def int4_steps(blocks: Float, scale: Float) -> npt.NDArray[np.uint8]:
    """Steps and zeros with the smallest squared error for blocks [..., block_size] of columns with scales [...].

    Clipping the largest weights a little often pays off.
    """
    best = np.zeros(blocks.shape[:-1], np.uint8)
    least = np.full(best.shape, np.inf, np.float32)
    for zero in INT4_ZEROS:
        whole = np.ceil(_ranges(blocks, zero) / scale)
        for less in range(3):
            steps = (np.clip(whole - less, 1, _most(zero)) + 16 * zero).astype(np.uint8)
            spread = scale[..., np.newaxis], steps[..., np.newaxis]
            error = np.square(restored_int4(int4_integers(blocks, *spread), *spread) - blocks).sum(axis=-1)
            best, least = np.where(error < least, steps, best), np.minimum(error, least)
    return best


def int4_integers(weights: Float, scale: Float, steps: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The integers, one a byte, that represent weights with these scales and steps."""
    integers: Float = np.clip(np.rint(weights / (scale * (steps & 15))) + (steps >> 4), 0, 15)
    return integers.astype(np.uint8)


def restored_int4(integers: npt.NDArray[np.uint8], scale: Float, steps: npt.NDArray[np.uint8]) -> Float:
    """The weights that integers, one a byte, represent with these scales and steps."""
    weights: Float = (integers.astype(np.float32) - (steps >> 4)) * (scale * (steps & 15))
    return weights


def pack_int4(integers: npt.NDArray[np.uint8], block_size: int) -> npt.NDArray[np.uint8]:
    """Integers [in, out] from 0 to 15 as in `Int4`."""
    return _packed(_blocks(integers, block_size))


def _ranges(blocks: Float, zero: int) -> Float:
    """The smallest steps with which the weights of blocks [..., block_size] fit around a zero, times their scale."""
    ranges: Float = np.maximum(blocks.max(axis=-1) / (15 - zero), blocks.min(axis=-1) / -zero)
    return ranges


def _most(zero: int) -> int:
    """The largest step with which all weights of a block fit in 8 bits."""
    return min(15, 127 // max(zero, 15 - zero))


def _blocks(values: npt.NDArray[Any], block_size: int) -> npt.NDArray[Any]:
    """Rows of each column in blocks, the last of which is padded with zeros: [in, out] to [out, blocks, block_size]."""
    rows, columns = values.shape
    num_blocks = -(-rows // block_size)
    padded = np.zeros((columns, num_blocks * block_size), values.dtype)
    padded[:, :rows] = values.T
    return padded.reshape(columns, num_blocks, block_size)


def _packed(integers: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    packed: npt.NDArray[np.uint8] = np.bitwise_or(integers[..., 0::2], integers[..., 1::2] << 4)
    return packed


def from_int4_blocks(weight: Int4, rows: int) -> Float:
    """The weights [rows, out] that a weight in 4 bits represents."""
    packed, steps, scale = weight
    integers = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], -1)
    blocks = restored_int4(integers, scale[:, np.newaxis, np.newaxis], steps[..., np.newaxis])
    return np.ascontiguousarray(blocks.reshape(len(packed), -1)[:, :rows].T)


def relative_error(reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """Norm of the difference over the norm of the reference; 0 when both are zeros."""
    size = float(np.linalg.norm(reference.astype(np.float64)))
    difference = float(np.linalg.norm(reference.astype(np.float64) - found))
    return difference / size if size > 0 else (0.0 if difference == 0 else np.inf)
