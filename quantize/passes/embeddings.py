"""Embeddings as int8 tables."""

from __future__ import annotations

import onnx_ir as ir

from u2moe.quantize.names import layer_of
from u2moe.quantize.passes.calls import calls, inputs_of, swap
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.builder import GraphBuilder, build_function


def quantize_embeddings(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Replace each look-up that the recipe quantizes."""
    for node in calls(model, "Embedding"):
        values, tokens = inputs_of(node)
        if recipe.format_of(layer_of(node), "embeddings") != "fp32":
            swap(model, node, int8_embedding(), [*weights.int8_table(values), tokens])


def int8_embedding() -> ir.Function:
    """Rows of an int8 table [vocab, dim] with a scale per row [vocab, 1]."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        weight, scale, tokens = inputs
        rows = g.op("Cast", g.op("Gather", weight, tokens, axis=0), to=ir.DataType.FLOAT)
        return g.op("Mul", rows, g.op("Gather", scale, tokens, axis=0))

    return build_function("Int8Embedding", ["weight", "scale", "tokens"], body)
