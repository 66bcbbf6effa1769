"""Activations as integers with one scale per token, which is a row of them, and products of these.

A token's result then depends neither on its chunk nor on its batch, and large tokens do not drown small ones. Rows are
divided by their largest magnitude, which makes the scale of the integers a constant, and multiplied by it again after
the product. For a row of zeros that magnitude is 0: its integers are then meaningless, but 0 times their product is
correct.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from u2moe.quantize.arithmetic import ACTIVATION_LEVELS, ACTIVATION_ZERO, LOWEST
from u2moe.quantize.passes.rewrite import new_call, present, replace
from u2moe.quantize.weights import Quantized
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function

STEP = 1 / ACTIVATION_LEVELS
"""Scale of the integers of a row whose largest magnitude is 1."""
ZERO = np.array(ACTIVATION_ZERO, np.uint8)


class QuantizedRows:
    """Rows of activations as integers, quantized once for all products that read them."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.rows: dict[ir.Value, Sequence[ir.Value]] = {}
        """Integers and largest magnitudes."""

    def multiply(self, node: ir.Node, weight: Quantized, kind: str | None) -> None:
        """Replace the MatMul `node` by an integer product; `kind` is the activation that its rows come from."""
        x = present(node, 0)
        if x not in self.rows:
            call = new_call(self.model, int8_rows(kind), node, [x], {"activation": kind or ""})
            for output, part in zip(call.outputs, ("q", "peak"), strict=True):
                output.name = f"{call.name}/{part}"
            self.model.graph.insert_before(node, call)
            self.rows[x] = call.outputs
        inputs = [*self.rows[x], weight.weight, weight.scale]
        replace(self.model.graph, node, new_call(self.model, int8_matmul(), node, inputs))


def activation_of(x: ir.Value) -> str | None:
    """The activation that x comes from, if it can be recognised and its lowest value is known."""
    node = x.producer()
    if node is None or node.op_type not in ("Relu", "Mul"):
        return None
    if node.op_type == "Relu":
        return "relu"
    gate = node.inputs[1].producer() if node.inputs[1] is not None else None
    is_swish = gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is node.inputs[0]
    return "swish" if is_swish else None


def int8_rows(kind: str | None = None) -> ir.Function:
    """Rows of x [..., in] as uint8 and the largest magnitude of each [..., 1]: x = peak * (q - zero) * step.

    Separate from `int8_matmul`, so that several products of one x quantize it only once.

    Args:
        kind: the activation that x comes from, one of `LOWEST`: a row's magnitude is then bounded by its largest value
            and the lowest value of the activation.
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
        (x,) = inputs
        peak = g.op("ReduceMax", g.op("Abs", x) if kind is None else x, [-1], keepdims=1)
        if kind is not None and LOWEST[kind]:
            peak = g.op("Max", peak, LOWEST[kind])
        return [g.op("QuantizeLinear", g.op("Div", x, peak), STEP, ZERO), peak]

    return build_function("Int8Rows", ["x"], body, {"activation": kind or ""})


def int8_matmul() -> ir.Function:
    """Y = x @ weight of quantized rows of x, see `int8_rows`, and weight int8 [in, out] with a scale per column."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        q, peak, weight, scale = inputs
        return g.op("Mul", g.op("MatMulIntegerToFloat", q, weight, STEP, scale, ZERO, domain=CONTRIB), peak)

    return build_function("Int8MatMul", ["q", "peak", "weight", "scale"], body)
