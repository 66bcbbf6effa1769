"""Quantization and dequantization of numpy arrays. Independent of graphs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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
LOWEST: Mapping[str, float] = MappingProxyType({"relu": 0.0, "gelu": 0.17, "swish": 0.2785})
"""Absolute value of the minimum of each activation whose negative outputs are small compared with its largest."""
NOTHING = 1e-30
"""Weights up to this magnitude are treated as zeros: their scale would be subnormal."""
INT4_LIMITS = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
"""Candidate scales: the largest weight of a block in 4-bit steps. Integers range from -8 to 7."""


def int8_columns(weight: Float) -> tuple[npt.NDArray[np.int8], Float]:
    """Symmetric int8 with one scale per column (output channel): [in, out] to integers [in, out] and scales [out].

    x86 without VNNI multiplies rows 2k and 2k + 1 by two uint8 at once and adds the products in 16 bits, which hold
    255 * 128 but not 255 * 129. The scale therefore comes from the largest weight of the column or, if that is larger,
    from the largest sum of such a pair: two roundings turn 127 into at most 128. Weights of 7 bits would also work,
    with half as much error again; activations of 7 bits have the largest error.

    A column of zeros gets scale 1 and stays zero.
    """
    paired = len(weight) - len(weight) % 2
    sums = np.abs(weight[0:paired:2] + weight[1:paired:2]).max(axis=0, initial=0)
    return _integers(weight, np.maximum(np.abs(weight).max(axis=0), sums))


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


def int4_blocks(weight: Float, block_size: int) -> tuple[npt.NDArray[np.uint8], Float]:
    """Symmetric 4-bit with one scale per block of rows of each column, packed as MatMulNBits reads it.

    Args:
        weight: [in, out].
        block_size: rows that share a scale; the last block is padded with zeros.

    Returns:
        Pairs of values in one byte, low half first, biased by 8: [out, blocks, block_size / 2]; scales [out, blocks].
    """
    blocks = _blocks(weight, block_size)
    scale = int4_scales(blocks)
    return _packed(int4_integers(blocks, scale)), scale[..., 0]


def int4_scales(blocks: Float) -> Float:
    """The scale with the smallest squared error for each block of 4-bit weights.

    Clipping the largest weight a little often pays off. A scale may be negative: the integers reach further below zero
    than above it, so that the sign decides which of a block's largest weights have room.

    Args:
        blocks: [..., block_size].

    Returns:
        Scales [..., 1]; 1 divided by some limit for blocks of zeros.
    """
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    largest[largest <= NOTHING] = 1
    best: Float = largest
    least = np.full_like(largest, np.inf)
    for limit in (*INT4_LIMITS, *(-limit for limit in INT4_LIMITS)):
        scale = largest / np.float32(limit)
        error = np.square(int4_integers(blocks, scale) * scale - blocks).sum(axis=-1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def int4_integers(weights: Float, scale: Float) -> Float:
    """The 4-bit integers that represent weights with these scales, as floats."""
    integers: Float = np.clip(np.rint(weights / scale), -8, 7)
    return integers


def pack_int4(integers: Float, block_size: int) -> npt.NDArray[np.uint8]:
    """Integers [in, out] from -8 to 7, packed as `int4_blocks` returns them."""
    return _packed(_blocks(integers, block_size))


def _blocks(values: Float, block_size: int) -> Float:
    """Rows of each column in blocks, the last of which is padded with zeros: [in, out] to [out, blocks, block_size]."""
    rows, columns = values.shape
    num_blocks = -(-rows // block_size)
    padded = np.zeros((columns, num_blocks * block_size), np.float32)
    padded[:, :rows] = values.T
    return padded.reshape(columns, num_blocks, block_size)


def _packed(integers: Float) -> npt.NDArray[np.uint8]:
    biased = (integers + 8).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = (biased[..., 0::2] | (biased[..., 1::2] << 4)).astype(np.uint8)
    return packed


def from_int4_blocks(packed: npt.NDArray[np.uint8], scale: Float, rows: int) -> Float:
    """The weights [rows, out] that the output of `int4_blocks` represents."""
    biased = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], -1)
    blocks = (biased.astype(np.float32) - 8) * scale[..., np.newaxis]
    return np.ascontiguousarray(blocks.reshape(len(packed), -1)[:, :rows].T)


def relative_error(reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """Norm of the difference over the norm of the reference; 0 when both are zeros."""
    size = float(np.linalg.norm(reference.astype(np.float64)))
    difference = float(np.linalg.norm(reference.astype(np.float64) - found))
    return difference / size if size > 0 else (0.0 if difference == 0 else np.inf)
