"""Alternative forms of our encoder graph: other ways to compute the experts, and onnxruntime's own quantizer.

Every graph keeps the contract, so that the runtime can run it instead of ours. Only the experts differ, except with
`stock_dynamic`, which replaces our quantization entirely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from u2moe.quantize.arithmetic import int4_blocks
from u2moe.quantize.config import recipe
from u2moe.quantize.experts.layer import ExpertLayer, expert_layers
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.weights import Weights
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function, define
from u2moe.runtime.graph.file import save_graph

Array = npt.NDArray[Any]

ACTIVATIONS: Mapping[str, str] = MappingProxyType({"swish": "silu", "relu": "relu", "gelu": "gelu"})
"""The operator's names for our activations; it supports no others."""
LARGEST_BLOCK = 128


def moe_layers(model: ir.Model) -> list[ExpertLayer]:
    """The mixtures of experts of a float32 graph, whose experts have biases.

    Raises:
        ValueError: there are none, or they have no biases.
        BundleError: they are not in the form that the exporter writes.
    """
    layers = expert_layers(model)
    if not layers or not all(layer.b1 for layer in layers):
        raise ValueError(f"the graph has {len(layers)} mixtures of experts, expected some, with biases")
    return layers


def masked(source: Path, target: Path) -> None:
    """Write `target`, in which every expert processes every token and a mask of zeros drops the unwanted results."""
    model = ir.load(source)
    for layer in moe_layers(model):
        function = define(model.functions, _masked_function(layer.mixture))
        _replace(model, layer, [ir.node(function.name, [layer.x, *layer.weights], domain=function.domain)])
    _save(model, target)


def _masked_function(mixture: Mixture) -> ir.Function:
    names = [f"e{expert}_{part}" for expert in range(mixture.num_experts) for part in ("w1", "b1", "w2", "b2")]

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, gate, *weights = inputs
        values, chosen = g.ops("TopK", g.op("MatMul", x, gate), [mixture.top_k], axis=-1, num_outputs=2)
        shares = g.op("Softmax", values, axis=-1)
        outputs = []
        for expert in range(mixture.num_experts):
            w1, b1, w2, b2 = weights[4 * expert : 4 * expert + 4]
            own = g.op("Where", g.op("Equal", chosen, expert), shares, 0.0)
            hidden = activation(g, g.op("Add", g.op("MatMul", x, w1), b1), mixture.activation)
            y = g.op("Add", g.op("MatMul", hidden, w2), b2)
            outputs.append(g.op("Mul", y, g.op("ReduceSum", own, [-1], keepdims=1)))
        return g.op("Sum", *outputs)

    return build_function("MaskedExperts", ["x", "gate", *names], body)


def contrib_moe(source: Path, target: Path) -> None:
    """Write `target` with onnxruntime's own float32 operator, com.microsoft.MoE."""
    model = ir.load(source)
    weights = Weights(model)
    for layer in moe_layers(model):
        inputs = [
            weights.stacked(values, read, ".stacked")
            for values, read in (
                (layer.w1, np.transpose),
                (layer.b1, np.asarray),
                (layer.w2, np.transpose),
                (layer.b2, np.asarray),
            )
        ]
        _replace(model, layer, _routed("MoE", layer, inputs, {}))
    _save(model, target)


def contrib_qmoe(source: Path, target: Path, *, bits: int) -> None:
    """Write `target` with onnxruntime's quantized operator, com.microsoft.QMoE.

    Everything else is our int8, so that only the experts differ.

    Args:
        source: a float32 encoder.
        target: the graph to write.
        bits: bits of the experts' weights, 4 or 8.
    """
    model = ir.load(source)
    moe_layers(model)
    quantize_graph(model, recipe("int8", {"experts": "fp32"}))
    use_qmoe(model, bits)
    _save(model, target)


def use_qmoe(model: ir.Model, bits: int) -> None:
    """Replace each mixture of experts in float32 by onnxruntime's quantized operator, with the router in float32.

    Its integer weights share a scale in blocks of input rows, and it rounds activations to int8, too.

    Args:
        model: the graph.
        bits: bits of the experts' weights, 4 or 8.
    """
    weights = Weights(model)
    for layer in expert_layers(model):
        _replace(model, layer, _contrib_qmoe(layer, weights, bits))
    model.graph.opset_imports.setdefault(CONTRIB, 1)


def _contrib_qmoe(layer: ExpertLayer, weights: Weights, bits: int) -> list[ir.Node]:
    common = math.gcd(*layer.sizes)
    size = min(common & -common, LARGEST_BLOCK)  # the largest power of two that divides both
    blocks = partial(_int8_blocks if bits == 8 else _int4_blocks, size=size)
    parts: list[ir.Value | None] = []
    for values, biases in ((layer.w1, layer.b1), (layer.w2, layer.b2)):
        parts += [
            weights.stacked(values, lambda array: blocks(array)[0], f".qmoe{bits}"),
            weights.stacked(values, lambda array: blocks(array)[1], ".scale"),
            weights.stacked(biases) if biases else None,
        ]
    attributes = {"expert_weight_bits": bits, "block_size": size, "accuracy_level": 4, "weights_prepacked": 0}
    return _routed("QMoE", layer, parts, attributes)


def _int4_blocks(weight: Array, size: int) -> tuple[Array, Array]:
    packed, scale = int4_blocks(weight, size)
    return packed.reshape(len(packed), -1), scale


def _int8_blocks(weight: Array, size: int) -> tuple[Array, Array]:
    """Weights [in, out] as bytes around 128 [out, in], and scales [out, blocks]."""
    blocks = weight.T.reshape(weight.shape[1], -1, size)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-20) / 127
    integers = (np.rint(blocks / scale) + 128).astype(np.uint8)
    return integers.reshape(weight.shape[::-1]), scale[..., 0].astype(np.float32)


def _routed(
    operator: str, layer: ExpertLayer, weights: Sequence[ir.Value | None], attributes: Mapping[str, int]
) -> list[ir.Node]:
    """The router, which is outside the operator, and the operator.

    Its softmax over all experts, renormalised over the chosen ones, equals the softmax over the chosen logits.
    """
    logits = ir.node("MatMul", [layer.x, layer.gate], name=f"{layer.node.name}/router")
    flat = ir.node("Flatten", [logits.outputs[0]], {"axis": -1}, name=f"{layer.node.name}/tokens")
    shared: dict[str, int | str] = {
        "k": layer.mixture.top_k,
        "activation_type": ACTIVATIONS[layer.mixture.activation],
        "normalize_routing_weights": 1,
    }
    moe = ir.node(operator, [layer.x, flat.outputs[0], *weights], {**shared, **attributes}, domain=CONTRIB)
    return [logits, flat, moe]


def _replace(model: ir.Model, layer: ExpertLayer, nodes: Sequence[ir.Node]) -> None:
    """Replace the layer's node by `nodes`, the last of which gives the result."""
    old, new = layer.node.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    name = old.name
    model.graph.insert_before(layer.node, nodes)
    old.replace_all_uses_with(new)
    model.graph.remove(layer.node, safe=True)
    new.name = name


def _save(model: ir.Model, target: Path) -> None:
    """Save without functions and weights that are no longer used."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    domains = {node.domain for node in model.graph} - set(model.graph.opset_imports)
    model.graph.opset_imports.update(dict.fromkeys(domains, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_graph(model, target)


def inlined(source: Path, target: Path) -> None:
    """Write `target` without model-local functions: tools that do not look inside them then see every node."""
    model = ir.load(source)
    _save(InlinePass()(model).model, target)


def stock_dynamic(source: Path, target: Path, *, matmuls_only: bool) -> None:
    """Write `target` with onnxruntime's `quantize_dynamic`, per channel like our int8, or with its defaults.

    Args:
        source: a float32 graph; only nodes outside model-local functions are quantized.
        target: the graph to write.
        matmuls_only: do not quantize convolutions, as is common because ConvInteger is slow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - takes seconds to import

    target.parent.mkdir(parents=True, exist_ok=True)
    large = source.with_name(f"{source.name}.data").exists()
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"] if matmuls_only else None,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=large,
    )
