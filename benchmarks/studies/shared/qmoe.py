"""The encoder with onnxruntime's own operator for experts, com.microsoft.QMoE: a peer, kept by no recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from u2moe.quantize.expert_layers import ExpertLayer, expert_layers
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.builder import CONTRIB
from u2moe.runtime.graph.file import save_graph

Array = npt.NDArray[Any]
QMOE_ACTIVATIONS = {"swish": "silu", "relu": "relu", "gelu": "gelu"}
"""The operator's names for our activations; it supports no others."""
LARGEST_BLOCK = 128


def qmoe(source: Path, target: Path) -> None:
    """Write the encoder with com.microsoft.QMoE in 8 bit; all else is our int8, so that only experts differ."""
    model = ir.load(source)
    quantize_graph(model, recipe("int8", {"experts": "fp32"}))
    weights = Weights(model)
    for layer in expert_layers(model):
        nodes = qmoe_nodes(layer, weights)
        old, new = layer.node.outputs[0], nodes[-1].outputs[0]
        new.type, new.shape, name = old.type, old.shape, old.name
        model.graph.insert_before(layer.node, nodes)
        old.replace_all_uses_with(new)
        model.graph.remove(layer.node, safe=True)
        new.name = name
    save_used(model, target)


def qmoe_nodes(layer: ExpertLayer, weights: Weights) -> list[ir.Node]:
    """Nodes for a layer; the last one gives the result."""
    common = math.gcd(*layer.sizes)
    size = min(common & -common, LARGEST_BLOCK)  # the largest power of two that divides both
    parts: list[ir.Value | None] = []
    for values_of, biases in ((layer.w1, layer.b1), (layer.w2, layer.b2)):
        parts += [
            weights.stacked(values_of, lambda array: int8_blocks(array, size)[0], ".qmoe8"),
            weights.stacked(values_of, lambda array: int8_blocks(array, size)[1], ".scale"),
            weights.stacked(biases) if biases else None,
        ]
    # the router is outside the operator, whose renormalised softmax equals that over the chosen logits
    logits = ir.node("MatMul", [layer.x, layer.gate], name=f"{layer.node.name}/router")
    flat = ir.node("Flatten", [logits.outputs[0]], {"axis": -1}, name=f"{layer.node.name}/tokens")
    attributes: dict[str, int | str] = {
        "k": layer.mixture.top_k, "activation_type": QMOE_ACTIVATIONS[layer.mixture.activation],
        "normalize_routing_weights": 1, "expert_weight_bits": 8, "block_size": size, "accuracy_level": 4,
        "weights_prepacked": 0,
    }  # fmt: skip
    return [logits, flat, ir.node("QMoE", [layer.x, flat.outputs[0], *parts], attributes, domain=CONTRIB)]


def int8_blocks(weight: Array, size: int) -> tuple[Array, Array]:
    """Weights [in, out] as bytes around 128 [out, in], and scales [out, blocks]."""
    blocks = weight.T.reshape(weight.shape[1], -1, size)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-20) / 127
    integers = (np.rint(blocks / scale) + 128).astype(np.uint8)
    return integers.reshape(weight.shape[::-1]), scale[..., 0].astype(np.float32)


def save_used(model: ir.Model, target: Path) -> None:
    """Save without functions and weights that are no longer used."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    domains = {node.domain for node in model.graph} - set(model.graph.opset_imports)
    model.graph.opset_imports.update(dict.fromkeys(domains, 1))
    save_graph(model, target)
