"""Experts in 4 bits, with MatMulNBits, which itself quantizes the activations of each row to int8."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from u2moe.quantize.config import Recipe
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder
from u2moe.runtime.graph.mixture import Experts, SparseDispatch, mixture_function
from u2moe.runtime.mixture import Mixture


def int4_experts(layer: ExpertLayer, weights: Weights, recipe: Recipe) -> ExpertCall:
    """Weights in blocks of `Recipe.block_size` rows with one scale each."""
    mixture = layer.in_format("int4", recipe, recipe.block_size)
    inputs: list[ir.Value] = []
    for index in range(mixture.num_experts):
        for own, biases in ((layer.w1, layer.b1), (layer.w2, layer.b2)):
            quantized = weights.int4(own[index], recipe.block_size)
            inputs += [quantized.weight, quantized.scale, *biases[index : index + 1]]
    return ExpertCall(mixture=mixture, function=int4_mixture(mixture, *layer.sizes), inputs=inputs)


def int4_mixture(mixture: Mixture, dim: int, hidden: int) -> ir.Function:
    """The function, for experts of these sizes."""
    suffixes = ("", "_scale", "_bias") if mixture.bias else ("", "_scale")
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
    weight, scale, *biases = parameters
    sizes = {"K": shape[0], "N": shape[1], "bits": 4, "block_size": block_size, "accuracy_level": 4}
    y = g.op("MatMulNBits", x, weight, scale, domain=CONTRIB, **sizes)
    return g.op("Add", y, biases[0]) if biases else y
