"""Activations, declared once for export, PyTorch, quantization and native kernels.

`python runtime/kernels/declare.py` writes their names and bounds to the header of the kernels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.validation import checked_choice


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An element-wise non-linearity.

    Quantization scales each row of outputs by the larger of `lowest` and the row's largest value. If `lowest` is None,
    it scales each row by the row's largest magnitude.
    """

    module: str  # name of the activation's class in `torch.nn`
    nodes: Callable[[GraphBuilder, ir.Value], ir.Value]  # adds the nodes of the activation, in float32
    # absolute value of the minimum; None if negative outputs are not small compared with positive ones
    lowest: float | None = None


def _gelu(g: GraphBuilder, x: ir.Value) -> ir.Value:
    erf = g.op("Erf", g.op("Div", x, math.sqrt(2.0)))
    return g.op("Mul", g.op("Mul", x, 0.5), g.op("Add", erf, 1.0))


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "relu": Activation(module="ReLU", nodes=lambda g, x: g.op("Relu", x), lowest=0.0),
        "swish": Activation(module="SiLU", nodes=lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)), lowest=0.2785),
        "gelu": Activation(module="GELU", nodes=_gelu, lowest=0.17),
        "tanh": Activation(module="Tanh", nodes=lambda g, x: g.op("Tanh", x)),
        "hardtanh": Activation(module="Hardtanh", nodes=lambda g, x: g.op("Clip", x, -1.0, 1.0)),
        "selu": Activation(module="SELU", nodes=lambda g, x: g.op("Selu", x)),
    }
)
"""Activations by their names in WeNet's train.yaml."""


def activation(g: GraphBuilder, x: ir.Value, kind: str) -> ir.Value:
    """Add nodes that compute kind(x) for a float32 x. `kind` is one of `ACTIVATIONS`."""
    return ACTIVATIONS[checked_choice("activation", kind, ACTIVATIONS)].nodes(g, x)


def lowest_of(kind: str) -> float | None:
    """Return `Activation.lowest` of the activation `kind`, or None if `kind` is ""."""
    return ACTIVATIONS[checked_choice("activation", kind, ACTIVATIONS)].lowest if kind else None
