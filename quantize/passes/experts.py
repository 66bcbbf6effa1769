"""Mixtures of experts in another number format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from u2moe.quantize.calibration import Activations
from u2moe.quantize.experts.int4 import int4_experts
from u2moe.quantize.experts.int8 import int8_experts
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer, expert_layers
from u2moe.quantize.names import layer_of
from u2moe.quantize.passes.calls import swap
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.dispatch import float_mixture

EXPERT_FORMATS: Mapping[str, Callable[[ExpertLayer, Weights, Recipe, Activations | None], ExpertCall]] = {
    "fp16": lambda layer, *_: (float_mixture(layer.in_format("fp16")), layer.weights[1:]),  # already halves
    "int8": int8_experts,
    "int4": int4_experts,
}
"""By format: the call that replaces a float32 layer, calibrated on tokens if there are any."""


def quantize_experts(model: ir.Model, weights: Weights, recipe: Recipe, activations: Activations | None = None) -> None:
    """Replace each mixture in float32 by one in the recipe's format; `activations` are for its calibration."""
    for layer in expert_layers(model):
        kind = recipe.whole or recipe.format_of(layer_of(layer.node), "experts")
        if kind != "fp32":
            function, inputs = EXPERT_FORMATS[kind](layer, weights, recipe, activations)
            swap(model, layer.node, function, [layer.x, layer.gate, *inputs])
