"""Experts in half precision."""

from __future__ import annotations

from u2moe.quantize.calibration import Activations
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.dispatch import float_mixture


def half_experts(layer: ExpertLayer, *_: Weights | Recipe | Activations | None) -> ExpertCall:
    """The weights unchanged; they must already be in half precision."""
    return float_mixture(layer.in_format("fp16")), layer.weights[1:]
