"""Experts in onnxruntime's own operator com.microsoft.QMoE instead of our dispatch: rewrite and numbers, no choice.

The operator rounds the weights of an expert to integers in blocks of input rows, and the activations to int8, too.
Blocks are as large as layer sizes and operator allow: smaller ones cost more scales and time. In float32 it adds in an
order that depends on how many tokens come together: a token's result may differ in its last bits with its chunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from u2moe.quantize.arithmetic import from_int4_blocks, int4_blocks
from u2moe.quantize.functions import CONTRIB, OPSET
from u2moe.quantize.rewrites import MOE_FUNCTION, Change
from u2moe.runtime import contract
from u2moe.runtime.errors import BundleError

Array = npt.NDArray[Any]
ACTIVATIONS: Mapping[str, str] = MappingProxyType({"swish": "silu", "relu": "relu", "gelu": "gelu"})
"""The operator's names of our activations; it has no others."""
BITS: Mapping[str, int] = MappingProxyType({"int8-qmoe": 8, "int4-qmoe": 4})
"""Bits of a weight by format of the experts."""
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128
_MIDDLE = 128
_EXPERT_NUMBER = re.compile(r"experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """One mixture of experts in a float32 graph of ours.

    Attributes:
        node: the call of the model-local function.
        top_k: experts of each token.
        kind: activation.
        x: what the layer reads [..., dim].
        gate: the router's weight [dim, experts].
        w1: first weight [dim, hidden] of each expert; `w2`: second [hidden, dim].
        b1: first bias [hidden] of each; `b2`: second [dim]; none where the layer has none.
    """

    node: ir.Node
    top_k: int
    kind: str
    x: ir.Value
    gate: ir.Value
    w1: Sequence[ir.Value]
    b1: Sequence[ir.Value]
    w2: Sequence[ir.Value]
    b2: Sequence[ir.Value]

    @property
    def weights(self) -> list[ir.Value]:
        """The router's, and weights and biases of all experts, in the order of the node's inputs."""
        return [value for value in self.node.inputs[1:] if value is not None]

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and hidden units of an expert."""
        tensor = self.w1[0].const_value
        if tensor is None:
            raise BundleError(f"weight {self.w1[0].name}: has no value")
        dim, hidden = tensor.shape.numpy()
        return dim, hidden


def expert_layers(model: ir.Model) -> list[ExpertLayer]:
    """The mixtures of experts of a float32 graph, in order.

    Raises:
        BundleError: one is not as the exporter writes them.
    """
    layers = []
    for node in model.graph:
        match = MOE_FUNCTION.match(node.op_type)
        if node.domain != contract.MOE_DOMAIN or match is None:
            continue
        values = [value for value in node.inputs if value is not None]
        parts = 2 if match[4] else 4
        if len(values) != len(node.inputs) or len(values) != 2 + parts * int(match[2]):
            raise BundleError(f"node {node.name}: {node.op_type} with {len(values)} inputs is no mixture of experts")
        x, gate, *weights = values
        w1, w2 = weights[::parts], weights[parts // 2 :: parts]
        b1, b2 = (weights[1::parts], weights[3::parts]) if parts == 4 else ([], [])
        layers.append(
            ExpertLayer(node=node, top_k=int(match[1]), kind=match[3], x=x, gate=gate, w1=w1, b1=b1, w2=w2, b2=b2)
        )
    return layers


def _check(layer: ExpertLayer) -> None:
    where = f"node {layer.node.name}: QMoE cannot compute it:"
    if layer.kind not in ACTIVATIONS:
        raise BundleError(f"{where} activation is {layer.kind}, expected one of {', '.join(ACTIVATIONS)}")
    if block_size(layer) < SMALLEST_BLOCK:
        dim, hidden = layer.sizes
        raise BundleError(f"{where} {dim} inputs and {hidden} hidden units have no common block of {SMALLEST_BLOCK}")


def block_size(layer: ExpertLayer) -> int:
    """Input rows that share a scale: the largest power of two, at most `LARGEST_BLOCK`, that divides both sizes."""
    common = math.gcd(*layer.sizes)
    return min(common & -common, LARGEST_BLOCK)


def to_qmoe(model: ir.Model, bits: int) -> dict[str, Change]:
    """Put the operator in the place of all mixtures of experts of a float32 graph; weights are read when it is saved.

    The rest of the graph stays as it is, and may be quantized already.

    Args:
        model: the graph.
        bits: 8 or 4, of a weight.

    Returns:
        What was replaced, by the name of the new integer weight, which is that of all experts of a layer.

    Raises:
        BundleError: a layer that the operator cannot compute.
    """
    changes: dict[str, Change] = {}
    for layer in expert_layers(model):
        _check(layer)
        size = block_size(layer)
        function = qmoe_mixture_of_experts(
            len(layer.w1), layer.top_k, layer.kind, bits=bits, block=size, has_bias=bool(layer.b1)
        )
        model.functions.setdefault(function.identifier(), function)
        model.functions.pop((layer.node.domain, layer.node.op_type, ""), None)
        inputs = []
        for weights, biases in ((layer.w1, layer.b1), (layer.w2, layer.b2)):
            weight, scale, change = _quantized(model, weights, bits, size)
            changes[str(weight.name)] = change
            inputs += [weight, scale, *([stacked(model, _name(biases[0]), biases, np.asarray)] if biases else [])]
        name = f"{(layer.node.name or '').rsplit('/', 1)[0]}/{function.name}"
        call = ir.Node(function.domain, function.name, [layer.x, layer.gate, *inputs], name=name)
        _replace(model.graph, layer.node, call)
    model.graph.opset_imports.update({contract.MOE_DOMAIN: 1, CONTRIB: 1})
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return changes


def qmoe_mixture_of_experts(
    num_experts: int, top_k: int, kind: str, *, bits: int, block: int, has_bias: bool
) -> ir.Function:
    """The mixture of experts in one operator, with a float32 router, which the operator leaves to the graph.

    Its softmax over all experts, renormalised over the chosen ones, is the softmax over the chosen logits. `w1` is that
    of all experts [experts, hidden, dim] (in 4 bits: dim / 2), and so are the others.
    """
    names = ["x", "gate"]
    for part in ("w1", "w2"):
        names += [part, f"{part}_scale", *([f"{part}_bias"] if has_bias else [])]
    w1_bias, w2_bias = ("w1_bias", "w2_bias") if has_bias else ('""', '""')
    name = f"Int{bits}QMixtureOfExperts_top{top_k}of{num_experts}_{kind}{'' if has_bias else '_no_bias'}_block{block}"
    text = f"""<domain: "{contract.MOE_DOMAIN}", opset_import: ["": {OPSET}, "{CONTRIB}": 1]>
    {name} ({", ".join(names)}) => (y) {{
        products = MatMul(x, gate)
        logits = Flatten<axis = -1>(products)
        y = {CONTRIB}.QMoE<k = {top_k}, activation_type = "{ACTIVATIONS[kind]}", normalize_routing_weights = 1,
            expert_weight_bits = {bits}, block_size = {block}, accuracy_level = 4, weights_prepacked = 0>
            (x, logits, w1, w1_scale, {w1_bias}, w2, w2_scale, {w2_bias})
    }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def int8_blocks(weight: Array, block: int) -> tuple[npt.NDArray[np.uint8], Array]:
    """Symmetric int8 with one scale per block of input rows: [in, out] to bytes around 128 [out, in] and scales.

    Scales are [out, blocks].
    """
    blocks = weight.T.reshape(weight.shape[1], -1, block)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-20) / 127
    integers = (np.rint(blocks / scale) + _MIDDLE).astype(np.uint8)
    return integers.reshape(weight.shape[1], -1), scale[..., 0].astype(np.float32)


def from_experts(stored: npt.NDArray[np.uint8], scale: Array, rows: int) -> Array:
    """The float32 weights [experts, in, out] of `rows` input rows that integers in one of the `BITS` stand for."""
    if stored.shape[-1] < rows:
        size = rows // scale.shape[-1]
        packed = stored.reshape(*stored.shape[:2], -1, size // 2)
        return np.stack([from_int4_blocks(own, factors, rows) for own, factors in zip(packed, scale, strict=True)])
    blocks = stored.astype(np.float32).reshape(*scale.shape, -1) - _MIDDLE
    restored: Array = (blocks * scale[..., np.newaxis]).reshape(stored.shape).swapaxes(1, 2)
    return restored


def stacked(model: ir.Model, name: str, values: Sequence[ir.Value], read: Callable[[Array], Array]) -> ir.Value:
    """One initializer of what `read` makes of the weights of all experts, computed when the graph is saved."""
    first = read(_array(values[0]))

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.stack([read(_array(value)) for value in values]), name=name)

    dtype = ir.DataType.from_numpy(first.dtype)
    tensor = ir.LazyTensor(load, dtype, ir.Shape((len(values), *first.shape)), name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _quantized(
    model: ir.Model, weights: Sequence[ir.Value], bits: int, block: int
) -> tuple[ir.Value, ir.Value, Change]:
    """Integers and scales of the weights of all experts, as initializers, and what they are of."""

    def parts(array: Array) -> tuple[Array, Array]:
        if bits == 8:
            return int8_blocks(array, block)
        packed, scale = int4_blocks(array, block)
        return packed.reshape(len(packed), -1), scale

    name = _name(weights[0])
    weight = stacked(model, f"{name}.qmoe{bits}", weights, lambda array: parts(array)[0])
    scale = stacked(model, f"{name}.scale", weights, lambda array: parts(array)[1])

    def original() -> Array:
        return np.stack([_array(value) for value in weights])

    return weight, scale, Change(group="experts", format=f"int{bits}-qmoe", original=original)


def _name(value: ir.Value) -> str:
    """The name of a weight of an expert, without the number of the expert."""
    return _EXPERT_NUMBER.sub("experts.", value.name or "", count=1)


def _array(value: ir.Value) -> Array:
    tensor = value.const_value
    if tensor is None:
        raise BundleError(f"weight {value.name}: has no value")
    array = np.array(tensor.numpy(), np.float32)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
