"""GPTQ (Frantar et al. 2022) for weights in int8 and 4 bits: minimises the output error on recorded tokens. No graphs.

Rows are rounded one after the other, and later rows compensate for the errors so far. The second product is fitted to
the hidden activations of the rounded first one, and the biases, which stay in float32, absorb the mean error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.quantize.arithmetic import (
    NOTHING,
    WEIGHT_LEVELS,
    Float,
    Int4,
    Int8,
    int4_integers,
    int4_scale,
    int4_steps,
    int8_columns,
    pack_int4,
    restored,
    restored_int4,
)

Double = npt.NDArray[np.float64]
DAMPING = 0.05
"""Regularisation: this fraction of the mean second moment of the inputs is added to each of them."""
INT8_ROWS = 64
"""Rows of a weight in int8 that are rounded before those after them are corrected."""


@dataclass(frozen=True, kw_only=True)
class RoundedWeight:
    """The weight of a product in int8 or 4 bits, and its bias.

    Attributes:
        weight: of inputs and outputs.
        bias: float32 [out]; None without one.
    """

    weight: Int8 | Int4
    bias: Float | None

    def __call__(self, inputs: Float) -> Float:
        """Inputs [n, in] to outputs [n, out], in float32."""
        return _affine(inputs, restored(self.weight, inputs.shape[1]), self.bias)


@dataclass(frozen=True, kw_only=True)
class FloatLayer:
    """An expert or a feed-forward layer in float32, or a product alone.

    Attributes:
        products: weight [in, out] and bias [out] (None: no bias) of each product: the first; of a gated layer the gate
            and the first; and the second, unless the first is alone.
        activation: the non-linearity of hidden units [n, hidden]; with a gate, of the gate.
    """

    products: Sequence[tuple[Float, Float | None]]
    activation: Callable[[Float], Float]

    def compensated(self, tokens: Float, shares: Float, block_size: int) -> list[RoundedWeight]:
        """All products in int8 or 4 bits.

        Args:
            tokens: inputs [n, dim], at least one.
            shares: weight of the layer in the output of each [n].
            block_size: rows that share a step in 4 bits; 0: int8.
        """
        first = self.products[: max(len(self.products) - 1, 1)]
        rounded = [fitted((tokens, tokens), shares, *product, block_size) for product in first]
        if len(self.products) > 1:
            expected = self._hidden([_affine(tokens, *product) for product in first])
            found = self._hidden([product(tokens) for product in rounded])
            rounded.append(fitted((expected, found), shares, *self.products[-1], block_size))
        return rounded

    def _hidden(self, values: Sequence[Float]) -> Float:
        hidden = self.activation(values[0])
        return hidden if len(values) == 1 else hidden * values[1]


def fitted(
    inputs: tuple[Float, Float], shares: Float, weight: Float, bias: Float | None, block_size: int
) -> RoundedWeight:
    """The rounded product that best approximates, on the second inputs, `weight` and `bias` on the first.

    Args:
        inputs: inputs of the float32 product and of the rounded product, [n, in] each.
        shares: weight of the error of each row [n].
        weight: [in, out].
        bias: [out]; None: the product has none, so the mean error remains.
        block_size: rows that share a step in 4 bits; 0: int8.
    """
    squares = np.square(shares) / max(float(np.square(shares).sum()), NOTHING)
    means = [squares @ part if bias is not None else np.zeros(part.shape[1], np.float32) for part in inputs]
    expected, found = ((part - mean) * shares[:, np.newaxis] for part, mean in zip(inputs, means, strict=True))
    moments = (found.T @ found).astype(np.float64)
    damping = DAMPING * float(np.trace(moments)) / len(moments) or 1.0
    moments[np.diag_indices_from(moments)] += damping
    target: npt.NDArray[Any] = weight
    if inputs[0] is not inputs[1]:
        target = np.linalg.solve(moments, found.T @ (expected @ weight) + damping * weight)
    rounded = compensated(target, moments, block_size)
    if bias is not None:
        bias = (bias + means[0] @ weight - means[1] @ restored(rounded, len(weight))).astype(np.float32)
    return RoundedWeight(weight=rounded, bias=bias)


def compensated(weight: npt.NDArray[Any], moments: Double, block_size: int) -> Int8 | Int4:
    """The weight that minimises the error of the outputs instead of its own.

    Scales of columns are those of plain rounding.

    Args:
        weight: [in, out].
        moments: sums of products of the inputs [in, in], positive definite.
        block_size: rows that share a step in 4 bits; 0: int8.
    """
    # row i, divided by the diagonal: the corrections of later rows for an error of 1 in row i
    factors = np.linalg.cholesky(np.linalg.inv(moments)).T
    sizes = factors.diagonal()
    left, single = weight.astype(np.float64), weight.astype(np.float32)
    scale = int4_scale(single, block_size) if block_size else int8_columns(single).scale
    integers: npt.NDArray[Any] = np.zeros(weight.shape, np.uint8 if block_size else np.int8)
    steps: list[npt.NDArray[np.uint8]] = []
    for begin in range(0, len(weight), block_size or INT8_ROWS):
        rows = slice(begin, min(begin + (block_size or INT8_ROWS), len(weight)))
        block, errors = left[rows], np.zeros(left[rows].shape)
        if block_size:
            steps.append(int4_steps(block.T.astype(np.float32), scale))
        for index in range(len(block)):
            row, values = begin + index, block[index].astype(np.float32)
            if block_size:
                integers[row] = int4_integers(values, scale, steps[-1])
                found = restored_int4(integers[row], scale, steps[-1])
            else:
                integers[row] = _int8_row(values / scale, integers[row - 1] if row % 2 else None)
                found = integers[row] * scale
            errors[index] = (block[index] - found) / sizes[row]
            block[index + 1 :] -= np.outer(factors[row, row + 1 : rows.stop], errors[index])
        left[rows.stop :] -= factors[rows, rows.stop :].T @ errors
    return Int4(pack_int4(integers, block_size), np.stack(steps, axis=1), scale) if steps else Int8(integers, scale)


def _int8_row(values: Float, first: npt.NDArray[np.int8] | None) -> Float:
    """The nearest integers; `first`: the other row of a pair, whose sums are limited, see `int8_columns`."""
    integers: Float = np.clip(np.rint(values), -WEIGHT_LEVELS, WEIGHT_LEVELS)
    other = 0 if first is None else first.astype(np.float32)
    return np.clip(integers, -WEIGHT_LEVELS - 1 - other, WEIGHT_LEVELS + 1 - other)


def _affine(inputs: Float, weight: Float, bias: Float | None) -> Float:
    y: Float = inputs @ weight
    return y if bias is None else y + bias
