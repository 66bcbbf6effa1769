"""The rewrites that quantize a graph, one per file, and the order in which they run.

Weights are found by the group that the exporter assigned and the node that reads them, never by operator type alone.
If the graph has something a recipe asks for in an unknown form, that is an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from u2moe.quantize.calibration import ExpertTokens
from u2moe.quantize.config import Recipe
from u2moe.quantize.passes.attention import GroupAttention
from u2moe.quantize.passes.embeddings import QuantizeEmbeddings
from u2moe.quantize.passes.experts import QuantizeExperts
from u2moe.quantize.passes.front_end import QuantizeFrontEnd
from u2moe.quantize.passes.half_precision import HalfPrecision
from u2moe.quantize.passes.normalization import GroupNormalization
from u2moe.quantize.passes.products import QuantizeProducts
from u2moe.quantize.passes.streamed_convolution import GroupConvolution
from u2moe.quantize.passes.weight_groups import WeightGroups
from u2moe.quantize.weights import Change
from u2moe.runtime.errors import BundleError


def quantize_graph(model: ir.Model, recipe: Recipe, tokens: ExpertTokens | None = None) -> dict[str, Change]:
    """Quantize a graph in place; weights are read and converted only when the graph is saved.

    Args:
        model: the graph.
        recipe: what to quantize, and how.
        tokens: recordings' tokens by layer, for the recipe's calibration: experts are then converted at once.

    Returns:
        The replaced weights, by the name of the new one.

    Raises:
        BundleError: a node is not in the form that the exporter writes, or the format cannot compute it.
    """
    changes: dict[str, Change] = {}
    for rewrite in _passes(recipe, tokens):
        try:
            rewrite(model)
        except ir.passes.InvariantError as error:
            if isinstance(error.__cause__, BundleError):
                raise error.__cause__ from None
            raise BundleError(f"{model.graph.name}: {error}") from error
        changes.update(getattr(rewrite, "changes", {}))
    return changes


def _passes(recipe: Recipe, tokens: ExpertTokens | None) -> Iterator[ir.passes.PassBase]:
    formats = recipe.quantized
    yield WeightGroups()
    if recipe.whole == "fp16":
        yield HalfPrecision()
        yield QuantizeExperts("fp16", recipe)
    else:
        if "experts" in formats:
            yield QuantizeExperts(formats["experts"], recipe, tokens)
        if "subsampling" in formats:
            yield QuantizeFrontEnd()
        if "embeddings" in formats:
            yield QuantizeEmbeddings()
        yield QuantizeProducts(formats.keys() - {"experts", "embeddings"})
        yield GroupAttention()
        yield GroupConvolution()
        yield GroupNormalization()
    yield RemoveUnusedNodesPass()
    yield RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
