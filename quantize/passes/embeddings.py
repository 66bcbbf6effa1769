"""Embeddings as tables in int8, or in 4 bits with a step per block of each row."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from u2moe.quantize.names import layer_of
from u2moe.quantize.passes.calls import calls, inputs_of, swap
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.builder import GraphBuilder, build_function
from u2moe.runtime.graph.file import array_of, shape_of


def quantize_embeddings(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Replace each look-up that the recipe quantizes."""
    for node in calls(model, "Embedding"):
        values, tokens = inputs_of(node)
        kind = recipe.format_of(layer_of(node), "embeddings")
        if kind == "int4":
            table = weights.int4(values, recipe.block_size, lambda values=values: array_of(values).T)  # type: ignore[misc]
            swap(model, node, int4_embedding(shape_of(values)[1], recipe.block_size), [*table, tokens])
        elif kind == "int8":
            swap(model, node, int8_embedding(), [*weights.int8_table(values), tokens])


def int8_embedding() -> ir.Function:
    """Rows of an int8 table [vocab, dim] with a scale per row [vocab, 1]."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        weight, scale, tokens = inputs
        rows = g.op("Cast", g.op("Gather", weight, tokens, axis=0), to=ir.DataType.FLOAT)
        return g.op("Mul", rows, g.op("Gather", scale, tokens, axis=0))

    return build_function("Int8Embedding", ["weight", "scale", "tokens"], body)


def int4_embedding(dim: int, block_size: int) -> ir.Function:
    """Columns, for tokens [batch, length], of a weight [dim, vocab] as `arithmetic.Int4`."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        weight, steps, scale, tokens = inputs
        digits = [g.op("Unsqueeze", part, [-1]) for part in _nibbles(g, g.op("Gather", weight, tokens, axis=0))]
        step, zero = (g.op("Unsqueeze", part, [-1, -2]) for part in _nibbles(g, g.op("Gather", steps, tokens, axis=0)))
        factors = g.op("Mul", step, g.op("Unsqueeze", g.op("Gather", scale, tokens, axis=0), [-1, -2, -3]))
        blocks = g.op("Mul", g.op("Sub", g.op("Concat", *digits, axis=-1), zero), factors)
        rows = g.op("Reshape", blocks, [0, 0, -(-dim // block_size) * block_size])
        return g.op("Slice", rows, [0], [dim], [-1])

    return build_function(
        "Int4Embedding", ["weight", "steps", "scale", "tokens"], body, {"dim": dim, "block_size": block_size}
    )


def _nibbles(g: GraphBuilder, both: ir.Value) -> list[ir.Value]:
    """The low and the high 4 bits of bytes, as float32."""
    low = g.op("BitwiseAnd", both, np.array(15, np.uint8))
    high = g.op("BitShift", both, np.array(4, np.uint8), direction="RIGHT")
    return [g.op("Cast", part, to=ir.DataType.FLOAT) for part in (low, high)]
