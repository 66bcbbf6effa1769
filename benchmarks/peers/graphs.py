"""Our encoder graph as others would have written it: other ways through the experts, and onnxruntime's own quantizer.

Every graph keeps the contract, so that the runtime runs it in the place of ours. Only the experts differ, except with
`stock_dynamic`, which leaves nothing of our quantization.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from u2moe.quantize import functions
from u2moe.quantize.config import FORMATS, Recipe
from u2moe.quantize.qmoe import ACTIVATIONS, ExpertLayer, expert_layers, stacked, to_qmoe
from u2moe.quantize.quantizer import save_graph
from u2moe.quantize.rewrites import rewrite
from u2moe.runtime import contract

OUR_REST = Recipe(name="int8-but-experts", groups={group: "int8" for group in FORMATS if group != "experts"})
"""Our int8 for everything but the experts."""


def moe_layers(model: ir.Model) -> list[ExpertLayer]:
    """The mixtures of experts of a float32 graph, whose experts have biases.

    Raises:
        ValueError: there are none, or they have no biases.
        BundleError: they are not as the exporter writes them.
    """
    layers = expert_layers(model)
    if not layers or not all(layer.b1 for layer in layers):
        raise ValueError(f"the graph has {len(layers)} mixtures of experts, expected some, with biases")
    return layers


def masked(source: Path, target: Path) -> None:
    """Write `target`, in which every expert computes every token and a mask of zeros drops what was not asked for."""
    model = ir.load(source)
    for layer in moe_layers(model):
        function = _masked_function(len(layer.w1), layer.top_k, layer.kind)
        model.functions.setdefault(function.identifier(), function)
        _replace(model, layer, [ir.node(function.name, [layer.x, *layer.weights], domain=function.domain)])
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
        inputs = [
            stacked(model, f"{values[0].name}.stacked", values, read)
            for values, read in (
                (layer.w1, np.transpose),
                (layer.b1, np.asarray),
                (layer.w2, np.transpose),
                (layer.b2, np.asarray),
            )
        ]
        _replace(model, layer, _contrib_moe(layer, inputs))
    _save(model, target)


def contrib_qmoe(source: Path, target: Path, *, bits: int) -> None:
    """Write `target` with onnxruntime's quantized operator, com.microsoft.QMoE, as recipes with -qmoe have it.

    All but the experts is our int8, so that they alone differ.

    Args:
        source: a float32 encoder of ours.
        target: the graph to write.
        bits: 4 or 8, of the experts.
    """
    model = ir.load(source)
    rewrite(model, OUR_REST)
    to_qmoe(model, bits)
    _save(model, target)


def _contrib_moe(layer: ExpertLayer, weights: Sequence[ir.Value]) -> list[ir.Node]:
    """The router, which the operator leaves to the graph, and the operator, on [batch, time, dim].

    Its softmax over all experts, renormalised over the chosen ones, is the softmax over the chosen logits.
    """
    logits = ir.node("MatMul", [layer.x, layer.gate], name=f"{layer.node.name}/router")
    flat = ir.node("Flatten", [logits.outputs[0]], {"axis": 2}, name=f"{layer.node.name}/tokens")
    attributes: dict[str, int | str] = {
        "k": layer.top_k,
        "activation_type": ACTIVATIONS[layer.kind],
        "normalize_routing_weights": 1,
    }
    moe = ir.node("MoE", [layer.x, flat.outputs[0], *weights], attributes, domain=functions.CONTRIB)
    return [logits, flat, moe]


def _replace(model: ir.Model, layer: ExpertLayer, nodes: Sequence[ir.Node]) -> None:
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
