"""Model-local ONNX functions that compute on quantized weights, written in ONNX's own text form.

Activations are quantized where they are used, with one scale per row (token): the result of a token then depends
neither on its chunk nor on its batch, and loud tokens do not drown quiet ones. Rows are divided by their largest
magnitude, which makes the scale of the integers the constant 1/127, and multiplied by it again after the product. That
magnitude is 0 for a row of zeros: its integers then mean nothing, but 0 times their product is what it should be.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from u2moe.runtime import contract

OPSET = 18
CONTRIB = "com.microsoft"
"""Operators of this domain are part of every onnxruntime build: no library of custom operators is needed."""

ACTIVATIONS = {
    "relu": "{y} = Relu({x})",
    "tanh": "{y} = Tanh({x})",
    "selu": "{y} = Selu({x})",
    "hardtanh": "{y}_low = Constant<value = float {{-1.0}}>() {y}_high = Constant<value = float {{1.0}}>() "
    "{y} = Clip({x}, {y}_low, {y}_high)",
    "swish": "{y}_gate = Sigmoid({x}) {y} = Mul({x}, {y}_gate)",
    "gelu": "{y}_root = Constant<value = float {{1.4142135623730951}}>() {y}_scaled = Div({x}, {y}_root) "
    "{y}_erf = Erf({y}_scaled) {y}_one = Constant<value = float {{1.0}}>() {y}_shifted = Add({y}_erf, {y}_one) "
    "{y}_half = Constant<value = float {{0.5}}>() {y}_left = Mul({x}, {y}_half) {y} = Mul({y}_left, {y}_shifted)",
}
"""Statements for y = activation(x)."""

LOWEST = {"relu": 0.0, "gelu": 0.17, "swish": 0.2785}
"""How far below zero an activation can reach, where that is little beside its largest values."""

CONSTANTS = """
    step = Constant<value = float {0.007874015748031496}>()
    middle = Constant<value = uint8 {128}>()
    last = Constant<value = int64[1] {-1}>()
"""
"""The scale of integers made from values in [-1, 1], and their zero."""


def make_function(name: str, parameters: Sequence[str], body: str, outputs: Sequence[str] = ("y",)) -> ir.Function:
    """A function of the project's domain with these statements."""
    text = f"""<domain: "{contract.MOE_DOMAIN}", opset_import: ["": {OPSET}, "{CONTRIB}": 1]>
    {name} ({", ".join(parameters)}) => ({", ".join(outputs)}) {{ {body} }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def int8_rows(kind: str | None = None) -> ir.Function:
    """Rows of x [..., in] as uint8 and the largest magnitude of each [..., 1]: x = peak * (q - 128) / 127.

    Apart from `int8_matmul`, so that several products of one x quantize it once.

    Args:
        kind: the activation that gave x, one of `LOWEST`: a row has no larger magnitude than its largest value, or than
            how low the activation can reach.
    """
    if kind is None:
        body = "size = Abs(x) peak = ReduceMax<keepdims = 1>(size, last)\n"
    elif LOWEST[kind]:
        body = f"""
        lowest = Constant<value = float {{{LOWEST[kind]}}}>()
        highest = ReduceMax<keepdims = 1>(x, last)
        peak = Max(highest, lowest)
        """
    else:
        body = "peak = ReduceMax<keepdims = 1>(x, last)\n"
    body += """
    ratio = Div(x, peak)
    q = QuantizeLinear(ratio, step, middle)
    """
    return make_function("Int8Rows" + (f"_{kind}" if kind else ""), ("x",), CONSTANTS + body, ("q", "peak"))


def int8_matmul() -> ir.Function:
    """Y = x @ weight of quantized rows of x, see `int8_rows`, and weight int8 [in, out] with a scale per column."""
    body = """
    unit = com.microsoft.MatMulIntegerToFloat(q, weight, step, scale, middle)
    y = Mul(unit, peak)
    """
    return make_function("Int8MatMul", ("q", "peak", "weight", "scale"), CONSTANTS + body)


def int8_embedding() -> ir.Function:
    """Rows of an int8 table [vocab, dim] with a scale per row [vocab, 1]."""
    body = """
    integers = Gather<axis = 0>(weight, tokens)
    row = Cast<to = 1>(integers)
    row_scale = Gather<axis = 0>(scale, tokens)
    y = Mul(row, row_scale)
    """
    return make_function("Int8Embedding", ("weight", "scale", "tokens"), body)


def skipping(skip_below: float) -> str:
    """What the name of a function says of it, behind all else that those of the exporter say; "" if it skips none."""
    return f"_skip{skip_below:g}".replace(".", "_") if skip_below else ""
