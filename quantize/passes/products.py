"""Products with weights in int8, with an activation scale per token (`token_scales`), or in 4 bits (`block_scales`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from u2moe.quantize.block_scales import int4_feed_forward, int4_linear
from u2moe.quantize.calibration import Activations
from u2moe.quantize.names import layer_of
from u2moe.quantize.passes.calls import calls, inputs_of, insert, swap
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.rounding import rounded_products
from u2moe.quantize.token_scales import (
    int8_feed_forward,
    int8_gated_feed_forward,
    int8_linear,
    int8_matmul,
    int8_rows,
)
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.file import group_of, shape_of
from u2moe.runtime.model.native import plain_name

_FEED_FORWARD = {"FeedForward": int8_feed_forward, "GatedFeedForward": int8_gated_feed_forward}
_ENDING_WITH_ACTIVATION = ("Activation", "CachedConvolution", "Convolution", "SubsamplingConvolutions")
_WITH_KNOWN_LOWEST = ("relu", "swish")
"""Activations whose lowest value is used for the scale of a product alone."""


def quantize_products(
    model: ir.Model, weights: Weights, recipe: Recipe, activations: Activations | None = None
) -> None:
    """Replace each linear or feed-forward layer in the recipe's format; `activations` are for int4.

    In int8, rows that several layers read are quantized once.
    """
    nodes = calls(model, "Linear", *_FEED_FORWARD)
    kinds = {node: recipe.format_of(layer_of(node), group_of(inputs_of(node)[1])) for node in nodes}
    num_readers = Counter(node.inputs[0] for node in nodes if kinds[node] == "int8")
    rows: dict[ir.Value, Sequence[ir.Value]] = {}
    for node in nodes:
        x, *parameters = inputs_of(node)
        if kinds[node] == "int4":
            _swap_int4(model, node, weights, recipe.block_size, activations)
        elif kinds[node] == "int8":
            quantized = list(_quantized(weights, parameters))
            if made := _FEED_FORWARD.get(plain_name(node.op_type)):
                function = made(node.attributes["activation"].as_string(), bias=bool(node.attributes["bias"].as_int()))
                swap(model, node, function, [x, *quantized])
                continue
            kind, bias = _activation_of(x), len(parameters) > 1
            if num_readers[x] == 1:
                swap(model, node, int8_linear(kind, bias=bias), [x, *quantized])
                continue
            if x not in rows:
                rows[x] = insert(model, node, int8_rows(kind), [x])
            swap(model, node, int8_matmul(bias=bias), [*rows[x], *quantized])


def _swap_int4(
    model: ir.Model, node: ir.Node, weights: Weights, block_size: int, activations: Activations | None
) -> None:
    x, *parameters = inputs_of(node)
    rows, columns = shape_of(parameters[0])
    kind = ""
    if plain_name(node.op_type) == "Linear":
        function = int4_linear(rows, columns, block_size, bias=len(parameters) > 1)
    else:
        kind, bias = node.attributes["activation"].as_string(), bool(node.attributes["bias"].as_int())
        gated = plain_name(node.op_type) == "GatedFeedForward"
        function = int4_feed_forward(rows, columns, block_size, kind, bias=bias, gated=gated)
    biases = {index: value for index, value in enumerate(parameters, 1) if len(shape_of(value)) == 1}
    products = [(value, biases.get(index)) for index, value in enumerate(parameters, 2) if index - 1 not in biases]
    found = None if activations is None else activations.rows(x.name)
    read = None if found is None else (found, np.ones(len(found), np.float32))
    swap(model, node, function, [x, *rounded_products(weights, products, block_size, kind, read, activations)])


def _quantized(weights: Weights, parameters: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """Matrices as integers and scales, and biases as they are."""
    for value in parameters:
        if len(shape_of(value)) == 1:
            yield value
        else:
            quantized = weights.int8(value)
            yield from (quantized.weight, quantized.scale)


def _activation_of(x: ir.Value) -> str | None:
    """The activation that a layer's output x comes from, if its lowest value is used."""
    producer = x.producer()
    if producer is None or plain_name(producer.op_type) not in _ENDING_WITH_ACTIVATION:
        return None
    kind = producer.attributes["activation"].as_string()
    return kind if kind in _WITH_KNOWN_LOWEST else None
