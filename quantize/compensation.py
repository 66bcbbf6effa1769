"""GPTQ (Frantar et al. 2022) for weights in any format: minimises the output error on recorded tokens. No graphs.

Rows are rounded one after the other, and later rows compensate for the errors so far. The second product is fitted to
the hidden activations of the rounded first one, and the biases, which stay in float32, absorb the mean error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.quantize.arithmetic import NOTHING, Float
from u2moe.quantize.formats.conversion import Parts, WeightConversion

Double = npt.NDArray[np.float64]
DAMPING = 0.05
"""Regularisation: this fraction of the mean second moment of the inputs is added to each of them."""


@dataclass(frozen=True, kw_only=True)
class RoundedWeight:
    """The weight of a product in another format, and its bias.

    Attributes:
        parts: what is stored of the weight; `weight`: what they stand for [in, out].
        bias: float32 [out]; None without one.
    """

    parts: Parts
    weight: Float
    bias: Float | None

    def __call__(self, inputs: Float) -> Float:
        """Inputs [n, in] to outputs [n, out], in float32."""
        return _affine(inputs, self.weight, self.bias)


def fitted_layer(
    products: Sequence[tuple[Float, Float | None]],
    activation: Callable[[Float], Float],
    tokens: Float,
    shares: Float,
    conversion: WeightConversion,
) -> list[RoundedWeight]:
    """All products of an expert or a feed-forward layer, or one alone.

    Args:
        products: weight [in, out] and bias [out] (None: no bias) of each product: the first; of a gated layer the gate
            and the first; and the second, unless the first is alone.
        activation: the non-linearity of hidden units [n, hidden]; with a gate, of the gate.
        tokens: inputs [n, dim], at least one.
        shares: weight of the layer in the output of each [n].
        conversion: to their format.
    """

    def hidden(values: Sequence[Float]) -> Float:
        active = activation(values[0])
        return active if len(values) == 1 else active * values[1]

    first = products[: max(len(products) - 1, 1)]
    rounded = [fitted((tokens, tokens), shares, *product, conversion) for product in first]
    if len(products) > 1:
        expected = hidden([_affine(tokens, *product) for product in first])
        found = hidden([product(tokens) for product in rounded])
        rounded.append(fitted((expected, found), shares, *products[-1], conversion))
    return rounded


def fitted(
    inputs: tuple[Float, Float], shares: Float, weight: Float, bias: Float | None, conversion: WeightConversion
) -> RoundedWeight:
    """The rounded product that best approximates, on the second inputs, `weight` and `bias` on the first.

    Args:
        inputs: inputs of the float32 product and of the rounded product, [n, in] each.
        shares: weight of the error of each row [n].
        weight: [in, out].
        bias: [out]; None: the product has none, so the mean error remains.
        conversion: to its format.
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
    parts = compensated(target, moments, conversion)
    restored = conversion.restored(parts, len(weight))
    if bias is not None:
        bias = (bias + means[0] @ weight - means[1] @ restored).astype(np.float32)
    return RoundedWeight(parts=parts, weight=restored, bias=bias)


def compensated(weight: npt.NDArray[Any], moments: Double, conversion: WeightConversion) -> Parts:
    """The weight that minimises the error of the outputs instead of its own.

    Args:
        weight: [in, out].
        moments: sums of products of the inputs [in, in], positive definite.
        conversion: to its format.
    """
    # row i, divided by the diagonal: the corrections of later rows for an error of 1 in row i
    factors = np.linalg.cholesky(np.linalg.inv(moments)).T
    sizes = factors.diagonal()
    left, rounding = weight.astype(np.float64), conversion.rounding(weight.astype(np.float32))
    for begin in range(0, len(weight), rounding.num_rows):
        rows = slice(begin, min(begin + rounding.num_rows, len(weight)))
        block, errors = left[rows], np.zeros(left[rows].shape)
        rounding.begin(block.astype(np.float32))
        for index in range(len(block)):
            row = begin + index
            errors[index] = (block[index] - rounding.restored(row, block[index].astype(np.float32))) / sizes[row]
            block[index + 1 :] -= np.outer(factors[row, row + 1 : rows.stop], errors[index])
        left[rows.stop :] -= factors[rows, rows.stop :].T @ errors
    return rounding.parts()


def _affine(inputs: Float, weight: Float, bias: Float | None) -> Float:
    y: Float = inputs @ weight
    return y if bias is None else y + bias
