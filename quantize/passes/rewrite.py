"""The base of all rewrites, and how they put function calls into a graph."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from u2moe.quantize.weights import Change, Weights
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.builder import define


class Rewrite(ir.passes.InPlacePass):
    """One rewrite of a graph; `requires` and `ensures` check what holds before and after it.

    Attributes:
        changes: the weights replaced in the last graph, by the name of the new one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes: dict[str, Change] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph in place."""
        weights = Weights(model)
        modified = self.rewrite(model, weights)
        self.changes = weights.changes
        return ir.passes.PassResult(model, modified=modified)

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, weights: Weights) -> bool:
        """Rewrite the graph, with new weights from `weights`; returns whether anything has changed."""


def new_call(
    model: ir.Model,
    function: ir.Function,
    near: ir.Node,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, Any] | None = None,
) -> ir.Node:
    """A call of `function`, named after the scope of the node `near`; not yet in the graph."""
    called = define(model.functions, function)
    for domain, version in {called.domain: 1, **called.opset_imports}.items():
        model.graph.opset_imports.setdefault(domain, version)
    name = (near.name or "").rsplit("/", 1)[0] + f"/{called.name}"
    return ir.node(called.name, inputs, attributes, domain=called.domain, num_outputs=len(called.outputs), name=name)


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Replace a node by another; both have one output."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def insert(graph: ir.Graph, call: ir.Node, before: ir.Node) -> ir.Value:
    """Insert a new call with one output before a node; returns its output."""
    call.outputs[0].name = call.name
    graph.insert_before(before, call)
    return call.outputs[0]


def present(node: ir.Node, index: int) -> ir.Value:
    """A required input of a node."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise BundleError(f"node {node.name}: input {index} is missing")
    return value


def only_reader(node: ir.Node) -> ir.Node:
    """The only node that reads the output of a node."""
    readers = list(node.outputs[0].uses())
    if len(readers) != 1:
        raise BundleError(f"node {node.name}: its output has {len(readers)} readers, expected 1")
    return readers[0].node
