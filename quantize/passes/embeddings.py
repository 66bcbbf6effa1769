"""Embeddings as int8 tables."""

from __future__ import annotations

import onnx_ir as ir

from u2moe.quantize.passes.rewrite import Rewrite, new_call, present, replace
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.builder import GraphBuilder, build_function
from u2moe.runtime.graph.file import group_of


class QuantizeEmbeddings(Rewrite):
    """Afterwards no float32 embedding is looked up."""

    def rewrite(self, model: ir.Model, weights: Weights) -> bool:
        """Replace each look-up."""
        nodes = _look_ups(model)
        for node in nodes:
            table = weights.int8_table(present(node, 0))
            call = new_call(model, int8_embedding(), node, [table.weight, table.scale, present(node, 1)])
            replace(model.graph, node, call)
        return bool(nodes)

    def ensures(self, model: ir.Model) -> None:
        """No float32 embedding is left."""
        for node in _look_ups(model):
            raise ir.passes.PostconditionError(f"node {node.name}: its table is in float32")


def _look_ups(model: ir.Model) -> list[ir.Node]:
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    tables = [(node, node.inputs[0]) for node in gathers]
    return [node for node, table in tables if table is not None and _is_embedding(table)]


def _is_embedding(table: ir.Value) -> bool:
    return table.const_value is not None and group_of(table) == "embeddings"


def int8_embedding() -> ir.Function:
    """Rows of an int8 table [vocab, dim] with a scale per row [vocab, 1]."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        weight, scale, tokens = inputs
        rows = g.op("Cast", g.op("Gather", weight, tokens, axis=0), to=ir.DataType.FLOAT)
        return g.op("Mul", rows, g.op("Gather", scale, tokens, axis=0))

    return build_function("Int8Embedding", ["weight", "scale", "tokens"], body)
