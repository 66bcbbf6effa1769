"""Experts in int8, with one activation scale per token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from u2moe.quantize.arithmetic import ACTIVATION_LEVELS, ACTIVATION_ZERO, LOWEST
from u2moe.quantize.calibration import Activations
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.rounding import rounded_experts
from u2moe.quantize.weights import Weights
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder
from u2moe.runtime.graph.dispatch import SparseDispatch, mixture_function


def int8_experts(layer: ExpertLayer, weights: Weights, _: Recipe, activations: Activations | None = None) -> ExpertCall:
    """Weights with one scale per column; the second biases of all experts form one input [experts, dim]."""
    mixture = layer.in_format("int8")
    experts = rounded_experts(layer, weights, 0, activations)
    second = [weights.stacked([own.pop() for own in experts])] if mixture.bias else []
    return int8_mixture(mixture), [*second, *itertools.chain(*experts)]


def int8_mixture(mixture: Mixture) -> ir.Function:
    """The function; after the router its inputs are `w2_bias`, if there are biases, and the weights of each expert."""
    parts = ("w1", "w1_scale", "w1_bias", "w2", "w2_scale") if mixture.bias else ("w1", "w1_scale", "w2", "w2_scale")
    names = [f"e{expert}_{part}" for expert in range(mixture.num_experts) for part in parts]
    return mixture_function(mixture, [*(["w2_bias"] if mixture.bias else []), *names], _experts)


def _experts(dispatch: SparseDispatch, weights: Sequence[ir.Value]) -> ir.Value:
    """Tokens are quantized once, before they are sorted.

    Hidden activations and their peaks are computed expert by expert, so that they fit in the cache, but the scales of
    all experts are computed together: with the few tokens of a chunk, starting an operator takes longer than running
    it. The scales and the second biases are applied in the weighted sum over a token's experts.
    """
    g, mixture = dispatch.g, dispatch.mixture
    second_biases, weights = weights[: int(mixture.bias)], weights[int(mixture.bias) :]
    size = len(weights) // mixture.num_experts
    own = [weights[index : index + size] for index in range(0, len(weights), size)]

    scale, zero = _scales(g, g.op("ReduceMax", g.op("Abs", dispatch.tokens), [-1], keepdims=0))
    q = g.op("QuantizeLinear", dispatch.tokens, scale, zero, axis=0)
    rows = dispatch.split(dispatch.gather(q))
    columns = dispatch.split(g.op("Unsqueeze", dispatch.gather(scale), [-1]))
    hidden = [
        _hidden(g, *parts, mixture.activation) for parts in zip(rows, columns, [part[:-2] for part in own], strict=True)
    ]
    scale, zero = _scales(g, _peaks(dispatch, hidden))
    outputs = []
    for y, y_scale, y_zero, part in zip(hidden, dispatch.split(scale), dispatch.split(zero), own, strict=True):
        outputs.append(_product(g, g.op("QuantizeLinear", y, y_scale, y_zero, axis=0), *part[-2:]))
    factors = g.op("Mul", dispatch.probabilities, dispatch.of_tokens(scale))
    summed = dispatch.weigh(dispatch.merge(outputs), factors)
    if not second_biases:
        return summed
    nothing = g.op("ConstantOfShape", g.op("Shape", dispatch.logits), value=ir.tensor(np.zeros(1, np.float32)))
    probabilities = g.op("ScatterElements", nothing, dispatch.experts, dispatch.probabilities, axis=1)
    return g.op("Gemm", probabilities, *second_biases, summed)


def _hidden(g: GraphBuilder, rows: ir.Value, scale: ir.Value, parameters: Sequence[ir.Value], kind: str) -> ir.Value:
    """Hidden activations of one expert, from its rows of the quantized tokens."""
    weight, weight_scale, *biases = parameters
    y = g.op("Mul", _product(g, rows, weight, weight_scale), scale)
    return activation(g, g.op("Add", y, biases[0]) if biases else y, kind)


def _product(g: GraphBuilder, q: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
    """The integer product, times the scales of the weight's columns; the scales of the rows are applied later."""
    zero = np.array(ACTIVATION_ZERO, np.uint8)
    return g.op("MatMulIntegerToFloat", q, weight, 1.0, scale, zero, domain=CONTRIB)


def _peaks(dispatch: SparseDispatch, hidden: Sequence[ir.Value]) -> ir.Value:
    """The largest magnitude of each row, for all experts.

    Before 1.32, onnxruntime's row maximum of an empty matrix has the shape of that matrix; concatenating it with the
    others corrects this, because it holds no elements.
    """
    g, kind = dispatch.g, dispatch.mixture.activation
    sizes = hidden if kind in LOWEST else [g.op("Abs", y) for y in hidden]
    peaks = dispatch.merge([g.op("ReduceMax", y, [-1], keepdims=0) for y in sizes])
    return g.op("Max", peaks, LOWEST[kind]) if LOWEST.get(kind) else peaks


def _scales(g: GraphBuilder, peaks: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Scales and zeros [rows] of rows with these largest magnitudes: x = scale * (q - zero)."""
    scale = g.op("Mul", peaks, 1 / ACTIVATION_LEVELS)
    return scale, g.op("Expand", np.array(ACTIVATION_ZERO, np.uint8), g.op("Shape", scale))
