"""Mixtures of experts in another number format."""

from __future__ import annotations

import onnx_ir as ir

from u2moe.quantize.calibration import Activations
from u2moe.quantize.experts import EXPERT_FORMATS
from u2moe.quantize.experts.layer import expert_layers
from u2moe.quantize.names import layer_of
from u2moe.quantize.passes.calls import swap
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights


def quantize_experts(model: ir.Model, weights: Weights, recipe: Recipe, activations: Activations | None = None) -> None:
    """Replace each mixture in float32 by one in the recipe's format; `activations` are for the calibration of int4."""
    for layer in expert_layers(model):
        kind = recipe.whole or recipe.format_of(layer_of(layer.node), "experts")
        if kind != "fp32":
            function, inputs = EXPERT_FORMATS[kind](layer, weights, recipe, activations)
            swap(model, layer.node, function, [layer.x, layer.gate, *inputs])
