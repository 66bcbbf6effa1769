"""ONNX functions that multiply by weights in 4 bits, with one step per block of rows (MatMulNBits).

MatMulNBits itself rounds each row of activations in blocks to int8, so that a token's result depends on it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function

Sizes = Mapping[str, Any]
"""`K`, `N`, and `block_size` of a product: numbers, or references to attributes of the function."""


def sizes_of(rows: int, columns: int, block_size: int) -> Sizes:
    """Of a weight [rows, columns]."""
    return {"K": rows, "N": columns, "block_size": block_size}


def has_odd_blocks(rows: int, block_size: int) -> bool:
    """Whether a weight has an odd number of blocks."""
    return bool(-(-rows // block_size) % 2)


def product(
    g: GraphBuilder, x: ir.Value, parameters: Sequence[ir.Value], sizes: Sizes, *, is_odd: bool | None = None
) -> ir.Value:
    """Y = x @ weight + bias; the parameters are integers, steps and scale of `arithmetic.Int4`, and any bias."""
    weight, steps, scale, *biases = parameters
    odd = has_odd_blocks(sizes["K"], sizes["block_size"]) if is_odd is None else is_odd
    others = _scales_and_zeros(g, steps, scale, is_odd=odd)
    y = g.op("MatMulNBits", x, weight, *others, domain=CONTRIB, **sizes, bits=4, accuracy_level=4)
    return g.op("Add", y, biases[0]) if biases else y


def _scales_and_zeros(g: GraphBuilder, steps: ir.Value, scale: ir.Value, *, is_odd: bool) -> list[ir.Value]:
    """The scales of all blocks and, two in a byte, their zeros.

    Onnxruntime computes them when it loads the graph, but not what a DequantizeLinear gives.
    """
    factors = g.op("Cast", g.op("BitwiseAnd", steps, np.array(15, np.uint8)), to=ir.DataType.FLOAT)
    scales = g.op("Mul", factors, g.op("Unsqueeze", scale, [-1]))
    zeros = g.op("BitShift", steps, np.array(4, np.uint8), direction="RIGHT")
    if is_odd:
        zeros = g.op("Pad", zeros, [0, 0, 0, 1], np.array(0, np.uint8))
    pairs = g.op("Reshape", zeros, [-1, 2])
    bytes_ = g.op("Cast", g.op("MatMulInteger", pairs, np.array([[1], [16]], np.uint8)), to=ir.DataType.UINT8)
    return [g.op("Reshape", scales, [-1]), g.op("Reshape", bytes_, [-1])]


def int4_linear(rows: int, columns: int, block_size: int, *, bias: bool) -> ir.Function:
    """Y = x @ weight + bias; products of all sizes share the function, which reads these from attributes."""
    attributes = {"in": rows, "out": columns, "block_size": block_size}
    sizes = {
        name: ir.RefAttr(name, attribute, ir.AttributeType.INT)
        for name, attribute in zip(("K", "N", "block_size"), attributes, strict=True)
    }

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        return product(g, inputs[0], inputs[1:], sizes, is_odd=has_odd_blocks(rows, block_size))

    return build_function("Int4Linear", ["x", "weight", "steps", "scale", *["bias"] * bias], body, attributes)


def int4_feed_forward(dim: int, hidden: int, block_size: int, kind: str, *, bias: bool, gated: bool) -> ir.Function:
    """Y = kind(x @ w1 + w1_bias) @ w2 + w2_bias; gated: with (kind(x @ gate) * (x @ w1 + w1_bias)) in it."""
    first, second = sizes_of(dim, hidden, block_size), sizes_of(hidden, dim, block_size)

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, *parameters = inputs
        gate, parameters = parameters[: 3 * gated], parameters[3 * gated :]
        half = len(parameters) // 2
        y = product(g, x, parameters[:half], first)
        y = g.op("Mul", activation(g, product(g, x, gate, first), kind), y) if gated else activation(g, y, kind)
        return product(g, y, parameters[half:], second)

    suffixes = ("", "_steps", "_scale", *["_bias"] * bias)
    names = [f"{weight}{suffix}" for weight in ("w1", "w2") for suffix in suffixes]
    name, gates = ("Int4GatedFeedForward", ["gate", "gate_steps", "gate_scale"]) if gated else ("Int4FeedForward", [])
    attributes = {"activation": kind, "bias": int(bias), "in": dim, "block_size": block_size}
    return build_function(name, ["x", *gates, *names], body, attributes)
