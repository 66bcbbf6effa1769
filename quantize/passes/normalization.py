"""Layer normalisations, with the addition before them, as one call, which native kernels replace."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from u2moe.quantize.passes.rewrite import Rewrite, new_call, present, replace
from u2moe.quantize.weights import Weights
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.builder import GraphBuilder, build_function


def normalization(epsilon: float) -> ir.Function:
    """Y [..., dim] = the layer normalisation of x [..., dim], with weight and bias [dim]."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        return g.op("LayerNormalization", *inputs, axis=-1, epsilon=epsilon)

    return build_function("Normalization", ["x", "weight", "bias"], body, {"epsilon": epsilon})


def add_normalization(epsilon: float) -> ir.Function:
    """The sum of x and a branch, both [..., dim], and its layer normalisation."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
        x, branch, *parameters = inputs
        total = g.op("Add", x, branch)
        return [total, g.op("LayerNormalization", total, *parameters, axis=-1, epsilon=epsilon)]

    return build_function("AddNormalization", ["x", "branch", "weight", "bias"], body, {"epsilon": epsilon})


class GroupNormalization(Rewrite):
    """Afterwards each layer normalisation is one call, with the residual addition before it. No number changes."""

    def rewrite(self, model: ir.Model, _: Weights) -> bool:
        """Replace each."""
        nodes = [node for node in model.graph if is_last_axis(node)]
        for node in nodes:
            epsilon = node.attributes["epsilon"].as_float()
            (x, *parameters), attributes = (present(node, index) for index in range(3)), {"epsilon": epsilon}
            total = x.producer()
            if total is None or not _joins_a_branch(total):
                replace(model.graph, node, new_call(model, normalization(epsilon), node, [x, *parameters], attributes))
                continue
            inputs = [*(present(total, index) for index in range(2)), *parameters]
            call = new_call(model, add_normalization(epsilon), node, inputs, attributes)
            model.graph.insert_before(total, call)
            for before, after in zip((x, node.outputs[0]), call.outputs, strict=True):
                after.name, after.type, after.shape = before.name, before.type, before.shape
                before.replace_all_uses_with(after, replace_graph_outputs=True)
        RemoveUnusedNodesPass()(model)
        return bool(nodes)


def is_last_axis(node: ir.Node) -> bool:
    """Whether a node is a layer normalisation over the last axis, with constants."""
    return (
        node.op_type == "LayerNormalization"
        and len(node.inputs) == 3
        and node.attributes["axis"].as_int() == -1
        and all(present(node, index).const_value is not None for index in (1, 2))
    )


def _joins_a_branch(total: ir.Node) -> bool:
    """Whether a node adds the result of a layer to what the layer has read, so that both have the same shape."""
    if total.op_type != "Add" or present(total, 0).const_value is not None:
        return False
    branch = present(total, 1).producer()
    return branch is not None and branch.domain == contract.MOE_DOMAIN and len(branch.outputs) == 1
