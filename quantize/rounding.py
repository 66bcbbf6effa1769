"""Layers rounded for what they read in recordings, if there was enough of it: GPTQ (Frantar et al. 2022) in any format.

Rows are rounded one after the other, and later rows compensate for the errors so far. The second product is fitted to
the hidden activations of the rounded first one, and the biases, which stay in float32, absorb the mean error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import NOTHING, Float
from u2moe.quantize.calibration import Activations
from u2moe.quantize.formats.conversion import Parts, WeightConversion
from u2moe.quantize.layers import ExpertLayer
from u2moe.quantize.routing import routed_layer
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.builder import ATTRIBUTES, IR_VERSION
from u2moe.runtime.graph.file import array_of, group_of, shape_of
from u2moe.runtime.graph.layers import activation_layer
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

Double = npt.NDArray[np.float64]
DAMPING = 0.05
"""Regularisation: this fraction of the mean second moment of the inputs is added to each of them."""


@dataclass(frozen=True)
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
        y: Float = inputs @ self.weight
        return y if self.bias is None else y + self.bias


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
        expected = hidden([RoundedWeight((), *product)(tokens) for product in first])
        found = hidden([product(tokens) for product in rounded])
        rounded.append(fitted((expected, found), shares, *products[-1], conversion))
    return rounded


def fitted(
    inputs: tuple[Float, Float], shares: Float, weight: Float, bias: Float | None, conversion: WeightConversion
) -> RoundedWeight:
    """The rounded product that best approximates, on the second inputs [n, in], `weight` and `bias` on the first.

    Errors of rows count by `shares` [n]. Without a bias the mean error remains.
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
    return RoundedWeight(parts, restored, bias)


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


def rounded_products(
    weights: Weights,
    products: Sequence[tuple[ir.Value, ir.Value | None]],
    conversion: WeightConversion,
    kind: str,
    rows: tuple[Float, Float] | None,
    activations: Activations | None,
) -> list[ir.Value]:
    """Integers, what belongs to them, and bias, if there is one, of each product of a layer, see `fitted_layer`.

    Where `rows`, what the layer reads [n, in] and its weight in the output of each [n], are none or fewer than inputs,
    each weight is rounded to the nearest value. `activations` count which of both it was.
    """
    made: Sequence[RoundedWeight | None] = [None] * len(products)
    enough = rows is not None and len(rows[0]) >= shape_of(products[0][0])[0]
    if rows is not None and enough:
        floats = [(array_of(weight), None if bias is None else array_of(bias)) for weight, bias in products]
        made = fitted_layer(floats, _activation(kind), *rows, conversion)
    if activations is not None:
        activations.products["compensated_products" if enough else "plain_products"] += len(products)
    inputs: list[ir.Value] = []
    for (weight, bias), product in zip(products, made, strict=True):
        inputs += weights.converted(weight, conversion, made=product.parts if product else None)
        if bias is not None and product is not None and product.bias is not None:
            name, read = f"{bias.name}.calibrated", partial(np.asarray, product.bias)
            bias = weights.add(name, ir.DataType.FLOAT, product.bias.shape, read, group_of(bias))  # noqa: PLW2901
        inputs += [] if bias is None else [bias]
    return inputs


def rounded_experts(
    layer: ExpertLayer, weights: Weights, conversion: WeightConversion, activations: Activations | None
) -> list[list[ir.Value]]:
    """As `rounded_products`, for each expert, calibrated on the tokens that it received."""
    tokens, router = None if activations is None else activations.rows(layer.x.name), routed_layer(layer.node)
    shares = None if tokens is None or router is None else router.shares(tokens)
    experts = []
    for index, weight in enumerate(zip(layer.w1, layer.w2, strict=True)):
        biases = (layer.b1[index], layer.b2[index]) if layer.mixture.bias else (None, None)
        own = None
        if tokens is not None and shares is not None:
            (chosen,) = np.nonzero(shares[:, index])
            own = tokens[chosen], shares[chosen, index]
        products = list(zip(weight, biases, strict=True))
        experts.append(rounded_products(weights, products, conversion, layer.mixture.activation, own, activations))
    return experts


@cache
def _activation(kind: str) -> Callable[[Float], Float]:
    """The activation as computed in graphs, as a function of arrays; "": none."""
    if not kind:
        return lambda values: values
    function = activation_layer(kind)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("rows", "columns"))
    call = ir.node(function.name, [x], function.meta[ATTRIBUTES], domain=function.domain)
    call.outputs[0].name, call.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {**function.opset_imports, function.domain: 1}
    graph = ir.Graph([x], call.outputs, nodes=[call], opset_imports=opsets, name="activation")
    content = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[function])).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=[DEFAULT_PROVIDER])
    return lambda values: np.asarray(session.run(None, {"x": values})[0])
