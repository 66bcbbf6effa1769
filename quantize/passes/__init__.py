"""How a graph is quantized: each named layer is swapped for one that computes the same with other numbers.

Weights belong to the groups that the exporter assigned.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from u2moe.quantize.calibration import Activations
from u2moe.quantize.layers import check_all_float
from u2moe.quantize.passes.front_end import quantize_front_end
from u2moe.quantize.passes.halves import in_half_precision, store_halves
from u2moe.quantize.passes.layers import quantize_embeddings, quantize_experts, quantize_products
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Change, Weights


def quantize_graph(model: ir.Model, recipe: Recipe, activations: Activations | None = None) -> dict[str, Change]:
    """Quantize a graph in place; weights are read and converted only when the graph is saved.

    Args:
        model: the graph.
        recipe: what to quantize, and how.
        activations: what layers read in recordings, for the recipe's calibration: layers are then converted at once.

    Returns:
        The replaced weights, by the name of the new one.

    Raises:
        BundleError: a layer is not one that the exporter writes, or the format cannot compute it.
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
    return weights.changes
