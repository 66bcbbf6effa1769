"""Experts in half precision."""

from __future__ import annotations

from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.dispatch import float_mixture


def half_experts(layer: ExpertLayer, _: Weights, __: Recipe) -> ExpertCall:
    """The weights unchanged; they must already be in half precision."""
    mixture = layer.in_format("fp16")
    return ExpertCall(mixture=mixture, function=float_mixture(mixture), inputs=layer.weights[1:])
