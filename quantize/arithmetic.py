"""Quantization and dequantization of numpy arrays. Independent of graphs."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
WEIGHT_LEVELS = 127  # weights in int8 are integers from -WEIGHT_LEVELS to WEIGHT_LEVELS
ACTIVATION_LEVELS = 127  # activations are uint8 values at most this far from `ACTIVATION_ZERO`
ACTIVATION_ZERO = 128  # the uint8 value that represents 0
POSITIVE_LEVELS = 255  # largest uint8 value of activations that are never negative; their zero point is 0
NOTHING = 1e-30  # weights up to this magnitude become zero because their scale would be subnormal
INT4_ZEROS = (6, 7, 8, 9)  # possible zero points of a block of 4-bit weights, whose integers range from 0 to 15


class Int8(NamedTuple):
    """A weight [in, out]: integers from -127 to 127, times a scale per column."""

    integers: npt.NDArray[np.int8]  # [in, out]
    scale: Float  # [out]


class Int4(NamedTuple):
    """A weight [in, out] in 4 bits. Columns are split into blocks of rows, each with its own step and zero point.

    Each value is (integer - zero) * step * scale. The product (integer - zero) * step fits in int8, and native kernels
    multiply these int8 numbers.
    """

    integers: npt.NDArray[np.uint8]  # [out, blocks, block_size / 2] as in MatMulNBits: even rows in the low 4 bits
    steps: npt.NDArray[np.uint8]  # [out, blocks], the step in the low 4 bits and the zero point in the high 4 bits
    scale: Float  # [out]


def int8_columns(weight: Float) -> Int8:
    """Quantize a weight [in, out] to int8 with one scale per column (output channel).

    x86 processors without VNNI add two products in 16 bits: those of the weights in rows 2k and 2k + 1. The sum fits if
    the two weights add up to at most 128; at 129 it may overflow. The scale therefore maps the larger of two values to
    127: the largest weight of the column, or the largest sum of two paired weights. Rounding raises this sum to at most
    128. The alternatives are less exact: 7-bit weights have 50 % more error, 7-bit activations even more.

    A column of zeros gets scale 1 and stays zero.
    """
    paired = len(weight) - len(weight) % 2
    sums = np.abs(weight[0:paired:2] + weight[1:paired:2]).max(axis=0, initial=0)
    return Int8(*_integers(weight, np.maximum(np.abs(weight).max(axis=0), sums)))


def int8_rows(weight: Float) -> tuple[npt.NDArray[np.int8], Float]:
    """Quantize embeddings [rows, dim], which are never summed, to int8; return integers and scales [rows, 1]."""
    integers, scale = _integers(weight.T, np.abs(weight).max(axis=1))
    return np.ascontiguousarray(integers.T), scale[:, np.newaxis]


def _integers(weight: Float, largest: Float) -> tuple[npt.NDArray[np.int8], Float]:
    """Quantize with one scale per column, which maps `largest` to `WEIGHT_LEVELS`. Returns integers and scales."""
    scale = np.where(largest > NOTHING, largest / WEIGHT_LEVELS, 1).astype(np.float32)
    return np.clip(np.rint(weight / scale), -WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8), scale


def int4_blocks(weight: Float, block_size: int) -> Int4:
    """Quantize a weight [in, out] to 4 bits. The last block is padded with zeros."""
    blocks, scale = blocks_of(weight, block_size), int4_scale(weight, block_size)
    steps = int4_steps(blocks, scale[:, np.newaxis])
    integers = int4_integers(blocks, scale[:, np.newaxis, np.newaxis], steps[..., np.newaxis])
    return Int4(packed_int4(integers), steps, scale)


def int4_scale(weight: Float, block_size: int) -> Float:
    """Return the smallest scale per column [out] that clips no block of a weight [in, out]; 1 for columns of zeros."""
    ranges = np.min([_ranges(blocks_of(weight, block_size), zero) for zero in INT4_ZEROS], axis=0)
    largest = ranges.max(axis=1)
    return np.where(largest > NOTHING, largest / _most(INT4_ZEROS[0]), 1).astype(np.float32)


def int4_steps(blocks: Float, scale: Float) -> npt.NDArray[np.uint8]:
    """Return steps and zero points with the smallest squared error for blocks [..., block_size] and scales [...]."""
    best = np.zeros(blocks.shape[:-1], np.uint8)
    least = np.full(best.shape, np.inf, np.float32)
    for zero in INT4_ZEROS:
        whole = np.ceil(_ranges(blocks, zero) / scale)
        for less in range(3):  # clipping the largest weights slightly often reduces the error
            steps = (np.clip(whole - less, 1, _most(zero)) + 16 * zero).astype(np.uint8)
            spread = scale[..., np.newaxis], steps[..., np.newaxis]
            error = np.square(restored_int4(int4_integers(blocks, *spread), *spread) - blocks).sum(axis=-1)
            best, least = np.where(error < least, steps, best), np.minimum(error, least)
    return best


def int4_integers(weights: Float, scale: Float, steps: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Round weights to integers (one per byte) with these scales and steps."""
    integers: Float = np.clip(np.rint(weights / (scale * (steps & 15))) + (steps >> 4), 0, 15)
    return integers.astype(np.uint8)


def restored_int4(integers: npt.NDArray[np.uint8], scale: Float, steps: npt.NDArray[np.uint8]) -> Float:
    """Return the weights that these integers (one per byte), scales and steps represent."""
    return np.asarray((integers.astype(np.float32) - (steps >> 4)) * (scale * (steps & 15)))


def _ranges(blocks: Float, zero: int) -> Float:
    """Return, for each block [..., block_size] with this zero point, the smallest scale * step that clips no value."""
    return np.asarray(np.maximum(blocks.max(axis=-1) / (15 - zero), blocks.min(axis=-1) / -zero))


def _most(zero: int) -> int:
    """Return the largest step at which every block with zero point `zero` fits in int8."""
    return min(15, 127 // max(zero, 15 - zero))


def blocks_of(values: npt.NDArray[Any], block_size: int) -> npt.NDArray[Any]:
    """Split [in, out] into blocks [out, blocks, block_size]; the last block is padded with zeros."""
    rows, columns = values.shape
    num_blocks = -(-rows // block_size)
    padded = np.zeros((columns, num_blocks * block_size), values.dtype)
    padded[:, :rows] = values.T
    return padded.reshape(columns, num_blocks, block_size)


def packed_int4(integers: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pack integers [..., block_size] from 0 to 15 into the layout of `Int4`."""
    return np.asarray(np.bitwise_or(integers[..., 0::2], integers[..., 1::2] << 4))


def from_int4_blocks(weight: Int4, rows: int) -> Float:
    """Convert a 4-bit weight to float32 [rows, out]."""
    packed, steps, scale = weight
    integers = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], -1)
    blocks = restored_int4(integers, scale[:, np.newaxis, np.newaxis], steps[..., np.newaxis])
    return np.ascontiguousarray(blocks.reshape(len(packed), -1)[:, :rows].T)


def kernel_matrix(weight: Float) -> Float:
    """Return a kernel [out, in, time, frequency] as [time * frequency * in, out]. Return a matrix unchanged."""
    return weight if weight.ndim == 2 else weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def relative_error(reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """Return the norm of the difference over the norm of the reference; 0 if both norms are zero."""
    size = float(np.linalg.norm(reference.astype(np.float64)))
    difference = float(np.linalg.norm(reference.astype(np.float64) - found))
    return difference / size if size > 0 else (0.0 if difference == 0 else np.inf)
