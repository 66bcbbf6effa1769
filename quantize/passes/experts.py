"""Mixtures of experts in another format."""

from __future__ import annotations

import dataclasses
import itertools

import onnx_ir as ir

from u2moe.quantize.calibration import Activations
from u2moe.quantize.calls import layer_of, swap
from u2moe.quantize.expert_layers import expert_layers
from u2moe.quantize.formats.table import conversion_for
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.rounding import rounded_experts
from u2moe.quantize.weights import Weights


def quantize_experts(model: ir.Model, weights: Weights, recipe: Recipe, activations: Activations | None = None) -> None:
    """Replace each mixture in float32 by one in the recipe's format; `activations` are for its calibration."""
    for layer in expert_layers(model):
        conversion = conversion_for(recipe, layer_of(layer.node), "experts")
        if conversion:
            experts = rounded_experts(layer, weights, conversion, activations)
            joined = layer.mixture.bias and conversion.joins_biases
            second = [weights.stacked([own.pop() for own in experts])] if joined else []
            kind, size = conversion.form.name, conversion.block_size
            mixture = dataclasses.replace(layer.mixture, weights=kind, block_size=size)
            inputs = [layer.x, layer.gate, *second, *itertools.chain(*experts)]
            swap(model, layer.node, conversion.mixture(mixture, *layer.sizes), inputs)
