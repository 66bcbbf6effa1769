"""Joins the encoder and the CTC head of a bundle to the graph that provides the encoder's inputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from u2moe.runtime.bundle.contract import Graph, Tensor
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.graph.builder import GraphBuilder, build_model, define

Joined = tuple[dict[str, ir.Value], tuple[ir.Model, ...]]  # values by name, and the partial graphs that compute them
Body = Callable[[GraphBuilder, dict[str, ir.Value]], Joined]  # adds nodes, which compute values from inputs by name


def tensor(name: str, *axes: str, dtype: str = "float32") -> Tensor:
    """Return an input or output of a graph."""
    return Tensor(name=name, dtype=dtype, axes=axes)


def joined_model(
    graph: Graph, scope: str, axes: Callable[[str | int], int | None], metadata: dict[str, str], body: Body
) -> ir.Model:
    """Build a model as `build_model` does, of the nodes that `body` adds in `scope` and the graphs that it returns."""
    parts: list[ir.Model] = []

    def whole(g: GraphBuilder, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
        with g.scope(scope):
            outputs, own = body(g, inputs)
        parts.extend(own)
        return outputs

    return closed(build_model(graph, axes, metadata, whole), *parts)


def joined(bundle: Bundle, feeds: dict[str, ir.Value], encoder: ir.Model | None = None) -> Joined:
    """Connect the bundle's encoder (or the given one) to `feeds`, and the CTC head to it. Return outputs and graphs."""
    encoder = encoder or ir.load(bundle.path / "encoder.onnx")
    ctc = ir.load(bundle.path / "ctc.onnx")
    for value in encoder.graph.inputs:
        value.replace_all_uses_with(feeds[str(value.name)])
    (output,) = (value for value in encoder.graph.outputs if value.name == "output")
    ctc.graph.inputs[0].replace_all_uses_with(output)
    return {str(value.name): value for part in (encoder, ctc) for value in part.graph.outputs}, (encoder, ctc)


def zeros(g: GraphBuilder, *sizes: Any, kind: type[np.generic] = np.float32) -> ir.Value:
    """Return zeros. The sizes of the axes are lists or values [n]; several are concatenated."""
    shape = g.op("Concat", *sizes, axis=0) if len(sizes) > 1 else sizes[0]
    return g.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, kind)))


def closed(model: ir.Model, *parts: ir.Model) -> ir.Model:
    """Move the nodes, weights and functions of `parts` into `model`; remove nodes that no output depends on."""
    graph = model.graph
    nodes = {node.name for node in graph}
    values = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    for part in parts:
        functions = list(part.functions.items())
        called = {identifier: define(model.functions, function) for identifier, function in functions}
        for node in part.graph:
            if node.op_identifier() in called:
                node.op_type = called[node.op_identifier()].name
        part.graph.outputs.clear()
        for name, value in list(part.graph.initializers.items()):  # equal weights with the same name are shared
            del part.graph.initializers[name]
            mine = graph.initializers.get(name)
            if mine is not None and _bytes(mine) == _bytes(value):
                value.replace_all_uses_with(mine)
            else:
                value.name = name if mine is None else f"{part.graph.name}/{name}"
                graph.register_initializer(value)
        for node in list(part.graph):
            part.graph.remove(node)
            _rename(node, nodes, part.graph.name)
            for value in node.outputs:
                _rename(value, values, part.graph.name)
            graph.append(node)
        graph.opset_imports.update(part.graph.opset_imports)
        model.ir_version = max(model.ir_version or 0, part.ir_version or 0)
    graph.sort()
    common.RemoveUnusedNodesPass()(model)
    return model


def inlined(model: ir.Model) -> ir.Model:
    """Inline all functions of the model, for programs that do not support functions."""
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    return model


def _rename(item: ir.Node | ir.Value, taken: set[str | None], prefix: str | None) -> None:
    if item.name in taken:
        item.name = f"{prefix}/{item.name}"
    taken.add(item.name)


def _bytes(value: ir.Value) -> bytes:
    return b"" if value.const_value is None else value.const_value.tobytes()
