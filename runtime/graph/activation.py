"""Element-wise non-linearities as nodes."""

from __future__ import annotations

import math

import onnx_ir as ir

from u2moe.runtime.graph.builder import GraphBuilder

ACTIVATIONS = ("relu", "swish", "gelu", "tanh", "hardtanh", "selu")


def activation(g: GraphBuilder, x: ir.Value, kind: str) -> ir.Value:
    """Y = kind(x), for one of `ACTIVATIONS`; x is float32."""
    if kind == "swish":
        return g.op("Mul", x, g.op("Sigmoid", x))
    if kind == "gelu":
        erf = g.op("Erf", g.op("Div", x, math.sqrt(2.0)))
        return g.op("Mul", g.op("Mul", x, 0.5), g.op("Add", erf, 1.0))
    if kind == "hardtanh":
        return g.op("Clip", x, -1.0, 1.0)
    return g.op({"relu": "Relu", "tanh": "Tanh", "selu": "Selu"}[kind], x)
