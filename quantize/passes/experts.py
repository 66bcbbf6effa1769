"""Mixtures of experts in another number format."""

from __future__ import annotations

import onnx_ir as ir

from u2moe.quantize.calibration import ExpertTokens
from u2moe.quantize.experts import EXPERT_FORMATS
from u2moe.quantize.experts.layer import expert_layers
from u2moe.quantize.names import layer_of
from u2moe.quantize.passes.calls import swap
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights


def quantize_experts(
    model: ir.Model, weights: Weights, default: str, recipe: Recipe, tokens: ExpertTokens | None = None
) -> None:
    """Replace each mixture in float32 by one in the format `default`, or in that of the recipe's exceptions.

    `tokens` are for the calibration of int4.
    """
    for layer in expert_layers(model):
        kind = recipe.exceptions.get(layer_of(layer.node), default)
        if kind != "fp32":
            function, inputs = EXPERT_FORMATS[kind](layer, weights, recipe, tokens)
            swap(model, layer.node, function, [layer.x, layer.gate, *inputs])
