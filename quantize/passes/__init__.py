"""Quantizes a graph: replaces layers with ones that compute the same function in another format.

A recipe sets a format for each group of weights. The exporter has assigned every weight to a group.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from u2moe.quantize.formats import conversion_for
from u2moe.quantize.formats.conversion import WeightConversion
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.layers import Weights, calls, check_all_float, expert_layers, inputs_of, insert, layer_of, swap
from u2moe.quantize.passes.front_end import quantize_front_end
from u2moe.quantize.passes.halves import in_half_precision, store_halves
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.rounding import Activations, rounded_experts, rounded_products
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.graph.file import group_of, shape_of


def quantize_experts(model: ir.Model, weights: Weights, recipe: Recipe, activations: Activations | None) -> None:
    """Replace each mixture that the recipe quantizes; calibrate on `activations` if given."""
    for layer in expert_layers(model):
        conversion = conversion_for(recipe, layer_of(layer.node), "experts")
        if conversion:
            experts = rounded_experts(layer, weights, conversion, activations)
            joined = layer.mixture.bias and conversion.joins_biases
            second = [weights.stacked([own.pop() for own in experts])] if joined else []
            kind, size = conversion.form.name, conversion.block_size
            mixture = dataclasses.replace(layer.mixture, weights=kind, block_size=size)
            function = conversion.mixture(mixture, *shape_of(layer.experts[0][0]))
            swap(model, layer.node, function, [layer.x, layer.gate, *second, *itertools.chain(*experts)])


def quantize_embeddings(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Replace each embedding look-up that the recipe quantizes."""
    for node in calls(model, "Embedding"):
        table, tokens = inputs_of(node)
        conversion = conversion_for(recipe, layer_of(node), "embeddings")
        if conversion:
            parts = weights.converted(table, conversion.of_tables(), change=np.transpose)  # a column for each token
            swap(model, node, conversion.embedding(shape_of(table)[1]), [*parts, tokens])


_FEED_FORWARD = ("FeedForward", "GatedFeedForward")
_ENDING_WITH_ACTIVATION = ("Activation", "CachedConvolution", "Convolution", "SubsamplingConvolutions")
_WITH_KNOWN_LOWEST = ("relu", "swish")  # products that read these activations use `Activation.lowest`


def quantize_products(model: ir.Model, weights: Weights, recipe: Recipe, activations: Activations | None) -> None:
    """Replace each linear or feed-forward layer by one in the recipe's format, calibrated on `activations` if given.

    In int8, linear layers that read the same input share one quantized copy of it.
    """
    nodes = calls(model, "Linear", *_FEED_FORWARD)
    made = {node: conversion_for(recipe, layer_of(node), group_of(inputs_of(node)[1])) for node in nodes}
    num_readers = Counter(node.inputs[0] for node in nodes if isinstance(made[node], Int8Conversion))
    rows: dict[ir.Value, Sequence[ir.Value]] = {}
    for node, conversion in made.items():
        if conversion is None:
            continue
        x, weight, *_ = inputs_of(node)
        inputs = _rounded(node, weights, conversion, activations)
        (dim, size), has_bias = shape_of(weight), node.attributes.get("bias")
        bias = bool(has_bias.as_int()) if has_bias else len(node.inputs) > 2
        if plain_name(node.op_type) in _FEED_FORWARD:
            kind, gated = node.attributes["activation"].as_string(), plain_name(node.op_type) == "GatedFeedForward"
            swap(model, node, conversion.feed_forward(dim, size, kind, bias=bias, gated=gated), [x, *inputs])
        elif not isinstance(conversion, Int8Conversion) or num_readers[x] == 1:
            swap(model, node, conversion.linear(dim, size, bias=bias, after=_activation_of(x)), [x, *inputs])
        else:
            if x not in rows:
                rows[x] = insert(model, node, conversion.rows(_activation_of(x)), [x])
            swap(model, node, conversion.product_of_rows(bias=bias), [*rows[x], *inputs])


def _rounded(
    node: ir.Node, weights: Weights, conversion: WeightConversion, activations: Activations | None
) -> list[ir.Value]:
    """Return the inputs that replace a layer's matrices and biases; each bias follows its matrix."""
    x, *parameters = inputs_of(node)
    biases = {index: value for index, value in enumerate(parameters, 1) if len(shape_of(value)) == 1}
    products = [(value, biases.get(index)) for index, value in enumerate(parameters, 2) if index - 1 not in biases]
    found = None if activations is None else activations.rows(x.name)
    read = None if found is None else (found, np.ones(len(found), np.float32))
    kind = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    return rounded_products(weights, products, conversion, kind, read, activations)


def _activation_of(x: ir.Value) -> str | None:
    """Return the activation that a layer's input x comes from; None unless it is one of `_WITH_KNOWN_LOWEST`."""
    maker = x.producer()
    is_known = maker is not None and plain_name(maker.op_type) in _ENDING_WITH_ACTIVATION
    kind = maker.attributes["activation"].as_string() if maker is not None and is_known else ""
    return kind if kind in _WITH_KNOWN_LOWEST else None


def quantize_graph(model: ir.Model, recipe: Recipe, activations: Activations | None = None) -> Weights:
    """Quantize a graph in place; return the new weights, which are read and converted when the graph is saved.

    Weights that are calibrated on `activations`, the recorded inputs of layers, are rounded in this call.
    Raises BundleError if a layer is already quantized, or is not one that the exporter writes.
    """
    check_all_float(model)
    weights = Weights(model)
    if recipe.whole:
        in_half_precision(model, weights)
    quantize_experts(model, weights, recipe, activations)
    quantize_front_end(model, weights, recipe)
    quantize_embeddings(model, weights, recipe)
    quantize_products(model, weights, recipe, activations)
    store_halves(model, weights, recipe)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return weights
