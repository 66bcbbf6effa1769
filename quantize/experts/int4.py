"""Experts in 4 bits. Native kernels multiply rows in int8, with one scale each; MatMulNBits rounds blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import Float
from u2moe.quantize.calibration import ExpertTokens
from u2moe.quantize.compensation import FloatExpert, RoundedWeight
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.names import scope
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Array, Weights
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import CONTRIB, IR_VERSION, GraphBuilder, build_function
from u2moe.runtime.graph.dispatch import Experts, SparseDispatch, mixture_function
from u2moe.runtime.graph.file import array_of
from u2moe.runtime.model.settings import DEFAULT_PROVIDER


def int4_experts(
    layer: ExpertLayer, weights: Weights, recipe: Recipe, tokens: ExpertTokens | None = None
) -> ExpertCall:
    """Weights in blocks of `Recipe.block_size` rows.

    With `tokens`, each expert is calibrated on those that it received; experts with too few tokens are rounded to the
    nearest value, as all are without.
    """
    num_experts = layer.mixture.num_experts
    found: Iterable[tuple[Array, Array] | None] = [None] * num_experts
    if tokens is not None:
        found = tokens.by_expert(scope(layer.node), num_experts)
    inputs: list[ir.Value] = []
    for index, own in enumerate(found):
        products = _float(layer, index).compensated(*own, recipe.block_size) if own else (None, None)
        inputs += _inputs(layer, index, weights, recipe, products)
    return int4_mixture(layer.in_format("int4", recipe.block_size), *layer.sizes), inputs


def _float(layer: ExpertLayer, index: int) -> FloatExpert:
    w1, w2 = array_of(layer.w1[index]), array_of(layer.w2[index])
    b1, b2 = (array_of(biases[index]) if biases else None for biases in (layer.b1, layer.b2))
    return FloatExpert(w1=w1, b1=b1, w2=w2, b2=b2, activation=_activation(layer.mixture.activation))


@cache
def _activation(kind: str) -> Callable[[Float], Float]:
    """The activation as computed in graphs, as a function of arrays."""
    function = build_function("Activation", ["x"], lambda g, inputs: activation(g, inputs[0], kind))
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("rows", "columns"))
    call = ir.node("Activation", [x], domain=function.domain)
    call.outputs[0].name, call.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {**function.opset_imports, function.domain: 1}
    graph = ir.Graph([x], call.outputs, nodes=[call], opset_imports=opsets, name="activation")
    content = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[function])).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=[DEFAULT_PROVIDER])
    return lambda values: np.asarray(session.run(None, {"x": values})[0])


def _inputs(
    layer: ExpertLayer,
    index: int,
    weights: Weights,
    recipe: Recipe,
    made: Sequence[RoundedWeight | None],
) -> list[ir.Value]:
    """Inputs of the function for one expert, from its calibrated products if there are any."""
    inputs: list[ir.Value] = []
    for own, biases, product in zip((layer.w1, layer.w2), (layer.b1, layer.b2), made, strict=True):
        inputs += weights.int4(own[index], recipe.block_size, product.weight if product else None).inputs
        if product and product.bias is not None:
            inputs.append(weights.changed(biases[index], product.bias))
        else:
            inputs += biases[index : index + 1]
    return inputs


def int4_mixture(mixture: Mixture, dim: int, hidden: int) -> ir.Function:
    """The function of a mixture whose experts have these sizes."""
    suffixes = ("", "_steps", "_scale", *(["_bias"] if mixture.bias else []))
    parts = [f"{weight}{suffix}" for weight in ("w1", "w2") for suffix in suffixes]
    names = [f"e{expert}_{part}" for expert in range(mixture.num_experts) for part in parts]
    return mixture_function(mixture, names, _experts(dim, hidden))


def _experts(dim: int, hidden: int) -> Experts:
    def experts(dispatch: SparseDispatch, weights: Sequence[ir.Value]) -> ir.Value:
        g, mixture = dispatch.g, dispatch.mixture
        size = len(weights) // mixture.num_experts
        outputs = []
        for index, rows in enumerate(dispatch.split(dispatch.gather(dispatch.tokens))):
            with g.scope(str(index)):
                own = weights[index * size : (index + 1) * size]
                y = _product(g, rows, own[: size // 2], (dim, hidden), mixture.block_size)
                y = activation(g, y, mixture.activation)
                outputs.append(_product(g, y, own[size // 2 :], (hidden, dim), mixture.block_size))
        return dispatch.weigh(dispatch.merge(outputs))

    return experts


def _product(
    g: GraphBuilder, x: ir.Value, parameters: Sequence[ir.Value], shape: tuple[int, int], block_size: int
) -> ir.Value:
    weight, steps, scale, *biases = parameters
    sizes = {"K": shape[0], "N": shape[1], "bits": 4, "block_size": block_size, "accuracy_level": 4}
    y = g.op(
        "MatMulNBits",
        x,
        weight,
        *_scales_and_zeros(g, steps, scale, -(-shape[0] // block_size)),
        domain=CONTRIB,
        **sizes,
    )
    return g.op("Add", y, biases[0]) if biases else y


def _scales_and_zeros(g: GraphBuilder, steps: ir.Value, scale: ir.Value, num_blocks: int) -> list[ir.Value]:
    """The scales of all blocks and, two in a byte, their zeros.

    Onnxruntime computes them when it loads the graph, but not what a DequantizeLinear gives.
    """
    factors = g.op("Cast", g.op("BitwiseAnd", steps, np.array(15, np.uint8)), to=ir.DataType.FLOAT)
    scales = g.op("Mul", factors, g.op("Unsqueeze", scale, [-1]))
    zeros = g.op("BitShift", steps, np.array(4, np.uint8), direction="RIGHT")
    if num_blocks % 2:
        zeros = g.op("Pad", zeros, [0, 0, 0, 1], np.array(0, np.uint8))
    pairs = g.op("Reshape", zeros, [-1, 2])
    bytes_ = g.op("Cast", g.op("MatMulInteger", pairs, np.array([[1], [16]], np.uint8)), to=ir.DataType.UINT8)
    return [g.op("Reshape", scales, [-1]), g.op("Reshape", bytes_, [-1])]
