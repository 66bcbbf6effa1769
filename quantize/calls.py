"""Calls of functions in a graph: found by name, named as layers, swapped for calls of other functions, and added."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.builder import ATTRIBUTES, define

_PART = re.compile(r".*?\.\d+\.[^.]+")


def scope(node: ir.Node) -> str:
    """The scope of a node's name, dotted as in a state dict."""
    return (node.name or "").rsplit("/", 1)[0].replace("/", ".")


def layer_of(node: ir.Node) -> str:
    """The layer of a call, as recipes and reports name it.

    Within a block it is a part of the block, such as `encoder.encoders.3.self_attn` with all its projections; elsewhere
    the call's scope.
    """
    name = scope(node)
    found = _PART.match(name)
    return found[0] if found else name


def calls(model: ir.Model, *names: str) -> list[ir.Node]:
    """The calls of functions of ours with one of these names, in order."""
    return [node for node in model.graph if node.domain == MOE_DOMAIN and plain_name(node.op_type) in names]


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """The inputs of a call.

    Raises:
        BundleError: one is missing.
    """
    values = [value for value in node.inputs if value is not None]
    if len(values) < len(node.inputs):
        raise BundleError(f"node {node.name}: an input is missing")
    return values


def swap(model: ir.Model, node: ir.Node, function: ir.Function, inputs: Sequence[ir.Value]) -> None:
    """Make a node a call of another function; its outputs stay."""
    called = _defined(model, function)
    node.op_type, node.name = called.name, _name(node, called)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    node.attributes.update({attribute.name: attribute for attribute in _attributes(function)})


def insert(model: ir.Model, before: ir.Node, function: ir.Function, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """Add a call in front of a node and in its scope; returns the outputs."""
    called = _defined(model, function)
    call = ir.Node(
        called.domain, called.name, inputs, _attributes(function),
        num_outputs=len(called.outputs), name=_name(before, called),
    )  # fmt: skip
    for output, parameter in zip(call.outputs, called.outputs, strict=True):
        output.name = f"{call.name}/{parameter.name}"
    model.graph.insert_before(before, call)
    return call.outputs


def _defined(model: ir.Model, function: ir.Function) -> ir.Function:
    called = define(model.functions, function)
    for domain, version in {called.domain: 1, **called.opset_imports}.items():
        model.graph.opset_imports.setdefault(domain, version)
    return called


def _attributes(function: ir.Function) -> Sequence[ir.Attr]:
    return ir.convenience.convert_attributes(function.meta[ATTRIBUTES])


def _name(near: ir.Node, called: ir.Function) -> str:
    return (near.name or "").rsplit("/", 1)[0] + f"/{called.name}"
