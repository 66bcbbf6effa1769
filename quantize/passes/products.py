"""Products with weights in int8, with an activation scale per token (`token_scales`), or in 4 bits (`block_scales`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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
    int8_linear,
    int8_matmul,
    int8_rows,
)
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.file import group_of, shape_of
from u2moe.runtime.model.native import plain_name

_FEED_FORWARD = ("FeedForward", "GatedFeedForward")
_ENDING_WITH_ACTIVATION = ("Activation", "CachedConvolution", "Convolution", "SubsamplingConvolutions")
_WITH_KNOWN_LOWEST = ("relu", "swish")
"""Activations whose lowest value is used for the scale of a product alone."""


def quantize_products(
    model: ir.Model, weights: Weights, recipe: Recipe, activations: Activations | None = None
) -> None:
    """Replace each linear or feed-forward layer in the recipe's format; `activations` are for its calibration.

    In int8, rows that several layers read are quantized once.
    """
    nodes = calls(model, "Linear", *_FEED_FORWARD)
    kinds = {node: recipe.format_of(layer_of(node), group_of(inputs_of(node)[1])) for node in nodes}
    num_readers = Counter(node.inputs[0] for node in nodes if kinds[node] == "int8")
    rows: dict[ir.Value, Sequence[ir.Value]] = {}
    for node in nodes:
        if kinds[node] == "fp32":
            continue
        x, block_size = inputs_of(node)[0], recipe.block_size if kinds[node] == "int4" else 0
        inputs = _rounded(node, weights, block_size, activations)
        if block_size or plain_name(node.op_type) in _FEED_FORWARD:
            swap(model, node, _function(node, block_size), [x, *inputs])
        elif num_readers[x] == 1:
            swap(model, node, int8_linear(_activation_of(x), bias=_has_bias(node)), [x, *inputs])
        else:
            if x not in rows:
                rows[x] = insert(model, node, int8_rows(_activation_of(x)), [x])
            swap(model, node, int8_matmul(bias=_has_bias(node)), [*rows[x], *inputs])


def _has_bias(node: ir.Node) -> bool:
    return bool(node.attributes["bias"].as_int()) if "bias" in node.attributes else len(node.inputs) > 2


def _function(node: ir.Node, block_size: int) -> ir.Function:
    """The function that computes a layer in 4 bits, or a feed-forward layer in int8."""
    (rows, columns), bias = shape_of(inputs_of(node)[1]), _has_bias(node)
    if plain_name(node.op_type) == "Linear":
        return int4_linear(rows, columns, block_size, bias=bias)
    kind, gated = node.attributes["activation"].as_string(), plain_name(node.op_type) == "GatedFeedForward"
    if not block_size:
        return int8_feed_forward(kind, bias=bias, gated=gated)
    return int4_feed_forward(rows, columns, block_size, kind, bias=bias, gated=gated)


def _rounded(node: ir.Node, weights: Weights, block_size: int, activations: Activations | None) -> list[ir.Value]:
    """The inputs that take the place of a layer's matrices and biases; each bias follows its matrix."""
    x, *parameters = inputs_of(node)
    biases = {index: value for index, value in enumerate(parameters, 1) if len(shape_of(value)) == 1}
    products = [(value, biases.get(index)) for index, value in enumerate(parameters, 2) if index - 1 not in biases]
    found = None if activations is None else activations.rows(x.name)
    read = None if found is None else (found, np.ones(len(found), np.float32))
    kind = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    return rounded_products(weights, products, block_size, kind, read, activations)


def _activation_of(x: ir.Value) -> str | None:
    """The activation that a layer's output x comes from, if its lowest value is used."""
    producer = x.producer()
    if producer is None or plain_name(producer.op_type) not in _ENDING_WITH_ACTIVATION:
        return None
    kind = producer.attributes["activation"].as_string()
    return kind if kind in _WITH_KNOWN_LOWEST else None
