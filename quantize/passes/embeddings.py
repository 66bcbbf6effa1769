"""Embeddings as tables in other formats."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from u2moe.quantize.calls import calls, inputs_of, layer_of, swap
from u2moe.quantize.formats.table import conversion_for
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Array, Weights
from u2moe.runtime.graph.file import array_of, shape_of


def quantize_embeddings(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Replace each look-up that the recipe quantizes."""
    for node in calls(model, "Embedding"):
        table, tokens = inputs_of(node)
        conversion = conversion_for(recipe, layer_of(node), "embeddings")
        if conversion:
            parts = weights.converted(table, conversion.of_tables(), read=partial(_columns, table))
            swap(model, node, conversion.embedding(shape_of(table)[1]), [*parts, tokens])


def _columns(table: ir.Value) -> Array:
    """The table with a column for each token [dim, vocab]."""
    return array_of(table).T
