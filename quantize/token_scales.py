"""ONNX functions that quantize activations with one scale per token (row), and multiply them by int8 weights.

A token's result then depends neither on its chunk nor on its batch. Rows are divided by their scales before they are
rounded, and products are multiplied by them. The scale of a row of zeros is 0: its integers are then meaningless, but 0
times their product is correct.

Native kernels replace whole functions: a product whose input has no other reader is one function with its quantization
and bias, and so is a feed-forward layer, gated or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from u2moe.quantize.arithmetic import ACTIVATION_LEVELS, ACTIVATION_ZERO, LOWEST
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function

ZERO = np.array(ACTIVATION_ZERO, np.uint8)


def int8_rows(kind: str | None = None) -> ir.Function:
    """Rows of x [..., in] as uint8, and the scale of each [..., 1]: x = scale * (q - zero).

    Separate from `int8_matmul`, so that several products of one x quantize it only once.

    Args:
        kind: the activation that x comes from, one of `LOWEST`: a row's magnitude is then bounded by its largest value
            and the lowest value of the activation.
    """
    return build_function("Int8Rows", ["x"], lambda g, inputs: _rows(g, inputs[0], kind), {"activation": kind or ""})


def int8_matmul(*, bias: bool = False) -> ir.Function:
    """Y = x @ weight + bias of quantized rows of x, see `int8_rows`; weight int8 [in, out] with a scale per column."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        q, row_scale, *parameters = inputs
        return _product(g, (q, row_scale), parameters)

    return build_function("Int8MatMul", ["q", "row_scale", *_parameters("", bias=bias)], body)


def int8_linear(kind: str | None = None, *, bias: bool = False) -> ir.Function:
    """Y = x @ weight + bias, `int8_rows` and `int8_matmul` in one."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, *parameters = inputs
        return _product(g, _rows(g, x, kind), parameters)

    return build_function("Int8Linear", ["x", *_parameters("", bias=bias)], body, {"activation": kind or ""})


def int8_feed_forward(kind: str, *, bias: bool, gated: bool = False) -> ir.Function:
    """Y = kind(x @ w1 + w1_bias) @ w2 + w2_bias; gated: with (kind(x @ gate) * (x @ w1 + w1_bias)) in it."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, *parameters = inputs
        gate, parameters = parameters[: 2 * gated], parameters[2 * gated :]
        half, rows = len(parameters) // 2, _rows(g, x, None)
        if gated:
            y = g.op("Mul", activation(g, _product(g, rows, gate), kind), _product(g, rows, parameters[:half]))
        else:
            y = activation(g, _product(g, rows, parameters[:half]), kind)
        return _product(g, _rows(g, y, kind if kind in LOWEST and not gated else None), parameters[half:])

    prefixes = [*_parameters("gate", bias=False)] * gated
    parameters = [*prefixes, *_parameters("w1", bias=bias), *_parameters("w2", bias=bias)]
    name = "Int8GatedFeedForward" if gated else "Int8FeedForward"
    return build_function(name, ["x", *parameters], body, {"activation": kind, "bias": int(bias)})


def _parameters(prefix: str, *, bias: bool) -> list[str]:
    names = (prefix, f"{prefix}_scale", f"{prefix}_bias") if prefix else ("weight", "scale", "bias")
    return list(names if bias else names[:2])


def _rows(g: GraphBuilder, x: ir.Value, kind: str | None) -> tuple[ir.Value, ir.Value]:
    peak = g.op("ReduceMax", g.op("Abs", x) if kind is None else x, [-1], keepdims=1)
    if kind is not None and LOWEST[kind]:
        peak = g.op("Max", peak, LOWEST[kind])
    scale = g.op("Mul", peak, 1 / ACTIVATION_LEVELS)
    return g.op("QuantizeLinear", g.op("Div", x, scale), 1.0, ZERO), scale


def _product(g: GraphBuilder, rows: tuple[ir.Value, ir.Value], parameters: Sequence[ir.Value]) -> ir.Value:
    (q, row_scale), (weight, scale, *biases) = rows, parameters
    y = g.op("Mul", g.op("MatMulIntegerToFloat", q, weight, 1.0, scale, ZERO, domain=CONTRIB), row_scale)
    return g.op("Add", y, biases[0]) if biases else y
