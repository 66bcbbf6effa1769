"""Experts in onnxruntime's own operator com.microsoft.QMoE instead of our dispatch.

The operator uses integer weights in blocks of input rows, and also quantizes the activations to int8. Blocks are as
large as the layer sizes and the operator allow: smaller ones need more scales and time. The order of its float32 sums
depends on the number of tokens in a call, so the last bits of a token's result may depend on its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from u2moe.quantize.arithmetic import from_int4_blocks, from_int8_blocks, int4_blocks, int8_blocks
from u2moe.quantize.config import Recipe
from u2moe.quantize.experts.layer import ExpertCall, ExpertLayer
from u2moe.quantize.weights import Array, Change, Weights
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function
from u2moe.runtime.graph.file import array_of, group_of

ACTIVATIONS: Mapping[str, str] = MappingProxyType({"swish": "silu", "relu": "relu", "gelu": "gelu"})
"""The operator's names for our activations; it supports no others."""
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128


@dataclass(frozen=True)
class _Numbers:
    """A format: its name, and how weights [in, out] become integers and scales in blocks of rows, and back."""

    name: str
    quantize: Callable[[Array, int], tuple[Array, Array]]
    restore: Callable[[Array, Array], Array]


def int8_qmoe(layer: ExpertLayer, weights: Weights, _: Recipe) -> ExpertCall:
    """Weights in 8 bits."""
    return _qmoe(layer, weights, _Numbers("int8-qmoe", int8_blocks, from_int8_blocks))


def int4_qmoe(layer: ExpertLayer, weights: Weights, _: Recipe) -> ExpertCall:
    """Weights in 4 bits, two per byte."""
    return _qmoe(layer, weights, _Numbers("int4-qmoe", _packed_blocks, _from_packed_blocks))


def _packed_blocks(weight: Array, size: int) -> tuple[Array, Array]:
    packed, scale = int4_blocks(weight, size)
    return packed.reshape(len(packed), -1), scale


def _from_packed_blocks(stored: Array, scale: Array) -> Array:
    return from_int4_blocks(stored.reshape(*scale.shape, -1), scale, 2 * stored.shape[1])


def _qmoe(layer: ExpertLayer, weights: Weights, numbers: _Numbers) -> ExpertCall:
    check_layer(layer)
    size = block_size(layer)
    mixture = layer.in_format(numbers.name, size)

    def restored(stored: Array, scale: Array) -> Array:
        return np.stack([numbers.restore(*own) for own in zip(stored, scale, strict=True)])

    inputs = []
    for values, biases in ((layer.w1, layer.b1), (layer.w2, layer.b2)):
        weight = weights.stacked(values, lambda array: numbers.quantize(array, size)[0], f".qmoe{_bits(mixture)}")
        # of the part of its name before the last dot: what reads both finds it so
        scale = weights.stacked(values, lambda array: numbers.quantize(array, size)[1], ".scale")
        weights.changes[str(weight.name)] = Change(
            group=group_of(weight), format=numbers.name, original=_reader(values), restored=restored
        )
        inputs += [weight, scale, *([weights.stacked(biases)] if biases else [])]
    return ExpertCall(mixture=mixture, function=qmoe_mixture(mixture), inputs=inputs)


def _reader(values: Sequence[ir.Value]) -> Callable[[], Array]:
    return lambda: np.stack([array_of(value) for value in values])


def _bits(mixture: Mixture) -> int:
    return 8 if mixture.weights == "int8-qmoe" else 4


def check_layer(layer: ExpertLayer) -> None:
    """Raise a BundleError if the operator cannot compute a layer."""
    where = f"node {layer.node.name}: QMoE cannot compute it:"
    if layer.mixture.activation not in ACTIVATIONS:
        raise BundleError(f"{where} activation is {layer.mixture.activation}, expected one of {', '.join(ACTIVATIONS)}")
    if block_size(layer) < SMALLEST_BLOCK:
        dim, hidden = layer.sizes
        raise BundleError(f"{where} {dim} inputs and {hidden} hidden units have no common block of {SMALLEST_BLOCK}")


def block_size(layer: ExpertLayer) -> int:
    """Input rows that share a scale: the largest power of two, at most `LARGEST_BLOCK`, that divides both sizes."""
    common = math.gcd(*layer.sizes)
    return min(common & -common, LARGEST_BLOCK)


def qmoe_mixture(mixture: Mixture) -> ir.Function:
    """The mixture of experts in one operator, with the router outside it, in float32.

    Its softmax over all experts, renormalised over the chosen ones, equals the softmax over the chosen logits. `w1`
    holds the weights of all experts [experts, hidden, dim] (in 4 bits: dim / 2); likewise the others.
    """
    parts = ("", "_scale", "_bias") if mixture.bias else ("", "_scale")
    names = [f"{weight}{part}" for weight in ("w1", "w2") for part in parts]

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, gate, *weights = inputs
        first, second = weights[: len(parts)], weights[len(parts) :]
        padded = [value for own in (first, second) for value in (*own, None)[:3]]
        logits = g.op("Flatten", g.op("MatMul", x, gate), axis=-1)
        attributes: dict[str, int | str] = {
            "k": mixture.top_k,
            "activation_type": ACTIVATIONS[mixture.activation],
            "normalize_routing_weights": 1,
            "expert_weight_bits": _bits(mixture),
            "block_size": mixture.block_size,
            "accuracy_level": 4,
            "weights_prepacked": 0,
        }
        return g.op("QMoE", x, logits, *padded, domain=CONTRIB, **attributes)

    return build_function(mixture.function, ["x", "gate", *names], body, mixture.attributes())
