"""Our encoder graph as others would have written it: other ways through the experts, and onnxruntime's own quantizer.

Every graph keeps the contract, so that the runtime runs it in the place of ours. Only the experts differ, except with
`stock_dynamic`, which leaves nothing of our quantization.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from u2moe.quantize import functions
from u2moe.quantize.arithmetic import int4_blocks
from u2moe.quantize.config import FORMATS, Recipe
from u2moe.quantize.quantizer import save_graph
from u2moe.quantize.rewrites import rewrite
from u2moe.runtime import contract

Array = npt.NDArray[Any]
CONTRIB = "com.microsoft"
CONTRIB_ACTIVATIONS = {"swish": "silu", "relu": "relu", "gelu": "gelu"}
LARGEST_BLOCK = 128
MOE_FUNCTION = re.compile(r"MixtureOfExperts_top(?P<top_k>\d+)of(?P<num>\d+)_(?P<kind>[a-z]+?)$")
OUR_REST = Recipe(name="int8-but-experts", groups={group: "int8" for group in FORMATS if group != "experts"})
"""Our int8 for everything but the experts."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One mixture of experts in a float32 graph of ours, whose experts have biases.

    Attributes:
        node: the call of the model-local function.
        top_k: experts of each token.
        kind: activation.
        experts: (w1 [dim, hidden], b1, w2 [hidden, dim], b2) of each.
    """

    node: ir.Node
    top_k: int
    kind: str
    experts: Sequence[tuple[ir.Value, ...]]

    @property
    def inputs(self) -> tuple[ir.Value, ir.Value]:
        """What the layer reads, and the router's weight [dim, experts]."""
        x, gate = self.node.inputs[:2]
        if x is None or gate is None:
            raise ValueError(f"{self.node.name}: an input is missing")
        return x, gate


def moe_layers(model: ir.Model) -> list[Layer]:
    """The mixtures of experts of a float32 graph.

    Raises:
        ValueError: there are none, or they are not as the exporter writes them.
    """
    layers = []
    for node in model.graph:
        match = MOE_FUNCTION.match(node.op_type)
        if node.domain != contract.MOE_DOMAIN or match is None:
            continue
        weights = [value for value in node.inputs[2:] if value is not None]
        if len(weights) != 4 * int(match["num"]):
            raise ValueError(f"{node.name}: {node.op_type} with {len(weights)} weights is no mixture of experts")
        experts = [tuple(weights[index : index + 4]) for index in range(0, len(weights), 4)]
        layers.append(Layer(node=node, top_k=int(match["top_k"]), kind=match["kind"], experts=experts))
    if not layers:
        raise ValueError("the graph has no mixture of experts")
    return layers


def masked(source: Path, target: Path) -> None:
    """Write `target`, in which every expert computes every token and a mask of zeros drops what was not asked for."""
    model = ir.load(source)
    for layer in moe_layers(model):
        function = _masked_function(len(layer.experts), layer.top_k, layer.kind)
        model.functions.setdefault(function.identifier(), function)
        weights = [value for expert in layer.experts for value in expert]
        _replace(model, layer, [ir.node(function.name, [*layer.inputs, *weights], domain=function.domain)])
    _save(model, target)


def _masked_function(num_experts: int, top_k: int, kind: str) -> ir.Function:
    names = [f"e{expert}_{part}" for expert in range(num_experts) for part in ("w1", "b1", "w2", "b2")]
    body = f"""
    logits = MatMul(x, gate)
    k = Constant<value = int64[1] {{{top_k}}}>()
    last = Constant<value = int64[1] {{-1}}>()
    nothing = Constant<value = float {{0.0}}>()
    values, chosen = TopK<axis = -1>(logits, k)
    shares = Softmax<axis = -1>(values)
    """
    for expert in range(num_experts):
        body += f"""
        id{expert} = Constant<value = int64 {{{expert}}}>()
        mask{expert} = Equal(chosen, id{expert})
        masked{expert} = Where(mask{expert}, shares, nothing)
        share{expert} = ReduceSum<keepdims = 1>(masked{expert}, last)
        p{expert} = MatMul(x, e{expert}_w1)
        h{expert} = Add(p{expert}, e{expert}_b1)
        {functions.ACTIVATIONS[kind].format(x=f"h{expert}", y=f"g{expert}")}
        q{expert} = MatMul(g{expert}, e{expert}_w2)
        o{expert} = Add(q{expert}, e{expert}_b2)
        y{expert} = Mul(o{expert}, share{expert})
        """
    body += f"y = Sum({', '.join(f'y{expert}' for expert in range(num_experts))})"
    name = f"MaskedExperts_top{top_k}of{num_experts}_{kind}"
    text = f"""<domain: "{contract.MOE_DOMAIN}.peer", opset_import: ["": 18]>
    {name} (x, gate, {", ".join(names)}) => (y) {{ {body} }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def contrib_moe(source: Path, target: Path) -> None:
    """Write `target` with onnxruntime's own float32 operator, com.microsoft.MoE."""
    model = ir.load(source)
    for layer in moe_layers(model):
        w1, b1, w2, b2 = zip(*layer.experts, strict=True)
        inputs = [
            _stacked(model, f"{w1[0].name}.stacked", w1, np.transpose),
            _stacked(model, f"{b1[0].name}.stacked", b1, np.asarray),
            _stacked(model, f"{w2[0].name}.stacked", w2, np.transpose),
            _stacked(model, f"{b2[0].name}.stacked", b2, np.asarray),
        ]
        _replace(model, layer, _contrib_nodes(layer, "MoE", inputs, {}))
    _save(model, target)


def contrib_qmoe(source: Path, target: Path, *, bits: int) -> None:
    """Write `target` with onnxruntime's quantized operator, com.microsoft.QMoE, in the largest blocks it can.

    All but the experts is our int8, so that they alone differ.

    Args:
        source: a float32 encoder of ours.
        target: the graph to write.
        bits: 4 or 8, of the experts.
    """
    model = ir.load(source)
    rewrite(model, OUR_REST)
    layers = moe_layers(model)
    block_size = _block_size(layers[0])
    quantized = {4: _int4, 8: _int8}[bits]
    for layer in layers:
        w1, b1, w2, b2 = zip(*layer.experts, strict=True)
        parts: list[ir.Value | None] = []
        for weights, biases in ((w1, b1), (w2, b2)):
            name = weights[0].name
            for index, part in enumerate(("integers", "scales")):

                def read(array: Array, index: int = index) -> Array:
                    return quantized(array, block_size)[index]

                parts.append(_stacked(model, f"{name}.{part}", weights, read))
            parts.append(_stacked(model, f"{name}.biases", biases, np.asarray))
        attributes = {"expert_weight_bits": bits, "block_size": block_size, "accuracy_level": 4, "weights_prepacked": 0}
        _replace(model, layer, _contrib_nodes(layer, "QMoE", parts, attributes))
    _save(model, target)


def _int8(weight: Array, block_size: int) -> tuple[Array, Array]:
    """A weight [in, out] as unsigned bytes around 128 [out, in] and scales [out, blocks]."""
    blocks = weight.T.reshape(weight.shape[1], -1, block_size)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-20) / 127
    integers = (np.rint(blocks / scale) + 128).astype(np.uint8)
    return integers.reshape(weight.shape[1], -1), scale[..., 0].astype(np.float32)


def _int4(weight: Array, block_size: int) -> tuple[Array, Array]:
    """The same in four bits around 8, two in a byte [out, in / 2]."""
    packed, scale = int4_blocks(np.asarray(weight, np.float32), block_size)
    return packed.reshape(len(packed), -1), scale


def _contrib_nodes(
    layer: Layer, op_type: str, weights: Sequence[ir.Value | None], attributes: dict[str, Any]
) -> list[ir.Node]:
    """The router, which the operator leaves to the graph, and the operator, on [batch, time, dim].

    Its softmax over all experts, renormalised over the chosen ones, is the softmax over the chosen logits.
    """
    x, gate = layer.inputs
    logits = ir.node("MatMul", [x, gate], name=f"{layer.node.name}/router")
    flat = ir.node("Flatten", [logits.outputs[0]], {"axis": 2}, name=f"{layer.node.name}/tokens")
    moe = ir.node(
        op_type,
        [x, flat.outputs[0], *weights],
        {
            "k": layer.top_k,
            "activation_type": CONTRIB_ACTIVATIONS[layer.kind],
            "normalize_routing_weights": 1,
            **attributes,
        },
        domain=CONTRIB,
    )
    return [logits, flat, moe]


def _stacked(model: ir.Model, name: str, values: Sequence[ir.Value], read: Callable[[Array], Array]) -> ir.Value:
    """One initializer of what `read` makes of the weights of all experts, computed when the graph is saved."""
    first = read(_array(values[0]))

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.stack([read(_array(value)) for value in values]), name=name)

    dtype = ir.DataType.from_numpy(first.dtype)
    tensor = ir.LazyTensor(load, dtype, ir.Shape((len(values), *first.shape)), name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _array(value: ir.Value) -> Array:
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"weight {value.name}: has no value")
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def _block_size(layer: Layer) -> int:
    """Rows that share a scale: the largest power of two, at most `LARGEST_BLOCK`, that divides both layer sizes."""
    w1, _, w2, _ = layer.experts[0]
    common = math.gcd(len(_array(w1)), len(_array(w2)))
    return min(common & -common, LARGEST_BLOCK)


def _replace(model: ir.Model, layer: Layer, nodes: Sequence[ir.Node]) -> None:
    """Put `nodes`, of which the last gives the result, in the place of the layer's node."""
    old, new = layer.node.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    name = old.name
    model.graph.insert_before(layer.node, nodes)
    old.replace_all_uses_with(new)
    model.graph.remove(layer.node, safe=True)
    new.name = name


def _save(model: ir.Model, target: Path) -> None:
    """Save without the functions and weights that nothing uses any more."""
    used = {node.op_identifier() for node in model.graph}
    for identifier in [identifier for identifier in model.functions if identifier not in used]:
        del model.functions[identifier]
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    domains = {node.domain for node in model.graph} - set(model.graph.opset_imports)
    model.graph.opset_imports.update(dict.fromkeys(domains, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_graph(model, target)


def inlined(source: Path, target: Path) -> None:
    """Write `target` without model-local functions: tools that do not look inside them then see every node."""
    model = ir.load(source)
    _save(InlinePass()(model).model, target)


def stock_dynamic(source: Path, target: Path, *, matmuls_only: bool) -> None:
    """Write `target` with onnxruntime's `quantize_dynamic`, per channel as our int8, or as it is by default.

    Args:
        source: a float32 graph; only what lies outside of model-local functions is quantized.
        target: the graph to write.
        matmuls_only: leave convolutions as they are, which is what those do who found ConvInteger slow.
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
