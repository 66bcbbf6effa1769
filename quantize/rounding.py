"""Layers of a graph in other formats, rounded for what they read in recordings if there was enough of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import Float
from u2moe.quantize.calibration import Activations
from u2moe.quantize.compensation import RoundedWeight, fitted_layer
from u2moe.quantize.expert_layers import ExpertLayer
from u2moe.quantize.formats.conversion import WeightConversion
from u2moe.quantize.routing import routed_layer
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.builder import ATTRIBUTES, IR_VERSION
from u2moe.runtime.graph.file import array_of, shape_of
from u2moe.runtime.graph.layers import activation_layer
from u2moe.runtime.model.settings import DEFAULT_PROVIDER


def rounded_products(
    weights: Weights,
    products: Sequence[tuple[ir.Value, ir.Value | None]],
    conversion: WeightConversion,
    kind: str,
    rows: tuple[Float, Float] | None,
    activations: Activations | None,
) -> list[ir.Value]:
    """Integers, what belongs to them, and bias, if there is one, of each product of a layer.

    Args:
        weights: those of the graph.
        products: weight and bias of each, see `FloatLayer`.
        conversion: to their format.
        kind: the activation between them; "" for a product alone.
        rows: what the layer reads [n, in] and its weight in the output of each [n]; None, or fewer rows than inputs:
            each weight is rounded to the nearest value.
        activations: counts which of both it was.
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
        if bias is not None:
            found = product.bias if product else None
            inputs.append(bias if found is None else weights.changed(bias, found))
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
