"""Experts in 4 bits. Native kernels multiply rows in int8, with one scale each; MatMulNBits rounds blocks of them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from u2moe.quantize.block_scales import product, sizes_of
from u2moe.quantize.calibration import Activations
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.rounding import rounded_experts
from u2moe.quantize.weights import Weights
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.dispatch import Experts, SparseDispatch, mixture_function


def int4_experts(
    layer: ExpertLayer, weights: Weights, recipe: Recipe, activations: Activations | None = None
) -> ExpertCall:
    """Weights in blocks of `Recipe.block_size` rows."""
    inputs = [value for own in rounded_experts(layer, weights, recipe.block_size, activations) for value in own]
    return int4_mixture(layer.in_format("int4", recipe.block_size), *layer.sizes), inputs


def int4_mixture(mixture: Mixture, dim: int, hidden: int) -> ir.Function:
    """The function of a mixture whose experts have these sizes."""
    suffixes = ("", "_steps", "_scale", *(["_bias"] if mixture.bias else []))
    parts = [f"{weight}{suffix}" for weight in ("w1", "w2") for suffix in suffixes]
    names = [f"e{expert}_{part}" for expert in range(mixture.num_experts) for part in parts]
    return mixture_function(mixture, names, _experts(dim, hidden))


def _experts(dim: int, hidden: int) -> Experts:
    def experts(dispatch: SparseDispatch, weights: Sequence[ir.Value]) -> ir.Value:
        g, mixture = dispatch.g, dispatch.mixture
        size = len(weights) // mixture.num_experts
        outputs = []
        for index, rows in enumerate(dispatch.split(dispatch.gather(dispatch.tokens))):
            with g.scope(str(index)):
                own = weights[index * size : (index + 1) * size]
                y = product(g, rows, own[: size // 2], sizes_of(dim, hidden, mixture.block_size))
                y = activation(g, y, mixture.activation)
                outputs.append(product(g, y, own[size // 2 :], sizes_of(hidden, dim, mixture.block_size)))
        return dispatch.weigh(dispatch.merge(outputs))

    return experts
