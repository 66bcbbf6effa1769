"""Other forms of our encoder graph: onnxruntime's operator for experts, QMoE, and its own quantizer.

Every graph keeps the contract, so that the runtime can run it instead of ours.
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
from u2moe.quantize.experts.layer import ExpertLayer, expert_layers
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.builder import CONTRIB
from u2moe.runtime.graph.file import save_graph

Array = npt.NDArray[Any]

ACTIVATIONS: Mapping[str, str] = MappingProxyType({"swish": "silu", "relu": "relu", "gelu": "gelu"})
"""The operator's names for our activations; it supports no others."""
LARGEST_BLOCK = 128


def contrib_qmoe(source: Path, target: Path, *, bits: int) -> None:
    """Write `target` with onnxruntime's quantized operator, com.microsoft.QMoE.

    Everything else is our int8, so that only the experts differ.

    Args:
        source: a float32 encoder.
        target: the graph to write.
        bits: bits of the experts' weights, 4 or 8.
    """
    model = ir.load(source)
    quantize_graph(model, recipe("int8", {"experts": "fp32"}))
    weights = Weights(model)
    for layer in expert_layers(model):
        _replace(model, layer, _qmoe(layer, weights, bits))
    _save(model, target)


def _qmoe(layer: ExpertLayer, weights: Weights, bits: int) -> list[ir.Node]:
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
    # the router is outside the operator, whose renormalised softmax equals that over the chosen logits
    logits = ir.node("MatMul", [layer.x, layer.gate], name=f"{layer.node.name}/router")
    flat = ir.node("Flatten", [logits.outputs[0]], {"axis": -1}, name=f"{layer.node.name}/tokens")
    attributes: dict[str, int | str] = {
        "k": layer.mixture.top_k, "activation_type": ACTIVATIONS[layer.mixture.activation],
        "normalize_routing_weights": 1, "expert_weight_bits": bits, "block_size": size, "accuracy_level": 4,
        "weights_prepacked": 0,
    }  # fmt: skip
    moe = ir.node("QMoE", [layer.x, flat.outputs[0], *parts], attributes, domain=CONTRIB)
    return [logits, flat, moe]


def _int4_blocks(weight: Array, size: int) -> tuple[Array, Array]:
    packed, scale = int4_blocks(weight, size)
    return packed.reshape(len(packed), -1), scale


def _int8_blocks(weight: Array, size: int) -> tuple[Array, Array]:
    """Weights [in, out] as bytes around 128 [out, in], and scales [out, blocks]."""
    blocks = weight.T.reshape(weight.shape[1], -1, size)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-20) / 127
    integers = (np.rint(blocks / scale) + 128).astype(np.uint8)
    return integers.reshape(weight.shape[::-1]), scale[..., 0].astype(np.float32)


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


def stock_dynamic(source: Path, target: Path) -> None:
    """Write `target` with onnxruntime's `quantize_dynamic` on all matrix products, per channel like our int8.

    Only nodes outside model-local functions are quantized. Convolutions are not, because ConvInteger is slow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - takes seconds to import

    target.parent.mkdir(parents=True, exist_ok=True)
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=source.with_name(f"{source.name}.data").exists(),
    )
