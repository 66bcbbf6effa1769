"""Experts in each number format; `runtime.graph.dispatch` dispatches tokens to them and combines the results.

A new format is a file here, a line in `EXPERT_FORMATS`, and the name of its function in `bundle.mixture.FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from u2moe.quantize.calibration import Activations
from u2moe.quantize.experts.half import half_experts
from u2moe.quantize.experts.int4 import int4_experts
from u2moe.quantize.experts.int8 import int8_experts
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Weights

EXPERT_FORMATS: Mapping[str, Callable[[ExpertLayer, Weights, Recipe, Activations | None], ExpertCall]] = (
    MappingProxyType(
        {
            "fp16": half_experts,
            "int8": int8_experts,
            "int4": int4_experts,
        }
    )
)
"""By format: the call that replaces a float32 layer, calibrated on tokens if there are any and it is int4."""
