"""Finds, names, replaces and inserts the layers of a graph and their weights. A layer is a call of a function.

Converted weights are computed lazily, one at a time, when the graph is saved.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from u2moe.quantize.arithmetic import Array
from u2moe.quantize.formats.conversion import Parts, WeightConversion
from u2moe.runtime.bundle.contract import GROUP_METADATA, MOE_DOMAIN, WEIGHT_GROUPS
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.builder import ATTRIBUTES, define, lazy_tensor
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import array_of, group_of, shape_of
from u2moe.runtime.graph.layers import PLAIN_LAYERS
from u2moe.runtime.validation import refused_as

_PART, _EXPERT_NUMBER = re.compile(r".*?\.\d+\.[^.]+"), re.compile(r"experts\.\d+\.")


def scope(node: ir.Node) -> str:
    """Return the scope part of a node's name, dotted as in a state dict."""
    return (node.name or "").rsplit("/", 1)[0].replace("/", ".")


def layer_of(node: ir.Node) -> str:
    """Return the layer that a call belongs to, as recipes and reports name it."""
    name = scope(node)  # in a block, its part is the layer, such as `encoder.encoders.3.self_attn` with all projections
    return found[0] if (found := _PART.match(name)) else name


def calls(model: ir.Model, *names: str) -> list[ir.Node]:
    """Return the calls of our functions with one of these names, in order."""
    return [node for node in model.graph if node.domain == MOE_DOMAIN and plain_name(node.op_type) in names]


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a call. Raises BundleError if an input is missing."""
    values = [value for value in node.inputs if value is not None]
    if len(values) < len(node.inputs):
        raise BundleError(f"node {node.name}: an input is missing")
    return values


def stored_value(value: ir.Value) -> ir.Value:
    """Return the float16 initializer from which a Cast makes this value, or the value itself."""
    maker = value.producer()
    half = maker.inputs[0] if maker is not None and maker.op_type == "Cast" else None
    stored = None if half is None else half.const_value
    return half if half is not None and stored is not None and stored.dtype == ir.DataType.FLOAT16 else value


def swap(model: ir.Model, node: ir.Node, function: ir.Function, inputs: Sequence[ir.Value]) -> None:
    """Turn a node into a call of another function; the node keeps its outputs."""
    called, node.name = _defined(model, node, function)
    turn_into(node, called.name, inputs, function.meta[ATTRIBUTES])


def turn_into(node: ir.Node, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any]) -> None:
    """Make a node call another operator of its domain; the node keeps its outputs."""
    node.op_type = op_type
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    node.attributes.update({made.name: made for made in ir.convenience.convert_attributes(attributes)})


def insert(model: ir.Model, before: ir.Node, function: ir.Function, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """Insert a call before a node, in the node's scope; return the outputs of the call."""
    called, name = _defined(model, before, function)
    attributes = ir.convenience.convert_attributes(function.meta[ATTRIBUTES])
    call = ir.Node(called.domain, called.name, inputs, attributes, num_outputs=len(called.outputs), name=name)
    for output, parameter in zip(call.outputs, called.outputs, strict=True):
        output.name = f"{call.name}/{parameter.name}"
    model.graph.insert_before(before, call)
    return call.outputs


def _defined(model: ir.Model, near: ir.Node, function: ir.Function) -> tuple[ir.Function, str]:
    """Define a function in a graph; return it, and the name of a call in the scope of `near`."""
    called = define(model.functions, function)
    for domain, version in {called.domain: 1, **called.opset_imports}.items():
        model.graph.opset_imports.setdefault(domain, version)
    return called, (near.name or "").rsplit("/", 1)[0] + f"/{called.name}"


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """A call of a mixture of experts in a float32 graph."""

    node: ir.Node
    mixture: Mixture
    x: ir.Value  # input [..., dim]
    gate: ir.Value  # weight of the router [dim, experts]
    experts: Sequence[Sequence[ir.Value]]  # weights [dim, hidden] and [hidden, dim], each with any bias after it


def expert_layers(model: ir.Model) -> list[ExpertLayer]:
    """Return a graph's float32 mixtures, in order. Raises BundleError for one that the exporter does not write."""
    layers = []
    for node in model.graph:
        mixture = _mixture(node)
        if mixture is None or mixture.weights != "fp32":
            continue
        values, size = [value for value in node.inputs if value is not None], 4 if mixture.bias else 2
        if len(values) != len(node.inputs) or len(values) != 2 + size * mixture.num_experts:
            raise BundleError(
                f"node {node.name}: {node.op_type} has {len(values)} inputs, which do not match its number of experts"
            )
        x, gate, *weights = values
        experts = [weights[begin : begin + size] for begin in range(0, len(weights), size)]
        layers.append(ExpertLayer(node=node, mixture=mixture, x=x, gate=gate, experts=experts))
    return layers


def check_all_float(model: ir.Model) -> None:
    """Raise a BundleError unless all layers of a graph are float32 and of kinds that the exporter writes."""
    calls = [(node, _mixture(node)) for node in model.graph if node.domain == MOE_DOMAIN]
    for node, mixture in sorted(calls, key=lambda call: call[1] is None):  # mixtures first, for clearer errors
        if plain_name(node.op_type) not in PLAIN_LAYERS if mixture is None else mixture.weights != "fp32":
            raise BundleError(f"node {node.name}: {node.op_type} is not a float32 layer")


def _mixture(node: ir.Node) -> Mixture | None:
    with refused_as(BundleError, f"node {node.name}"):
        return mixture_of(node)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A weight that was replaced, and its group in `contract.WEIGHT_GROUPS`."""

    group: str
    original: Callable[[], Array]  # reads the float32 weight, in the layout of the new weight
    parts: Sequence[str]  # name suffixes of initializers
    restored: Callable[..., Array]  # computes float32 weights from the stored integers and parts


class Weights:
    """The weights that replace those of one graph."""

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.changes = model.graph, dict[str, Change]()  # by the name of the new weight
        # layers with a weight, scale or bias that stays float32 because float16 cannot represent it
        self.kept = set[str]()

    def add(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], Array], group: str
    ) -> ir.Value:
        """Return the initializer called `name`; add it first if there is none."""
        if name not in self.graph.initializers:
            tensor = lazy_tensor(name, dtype, shape, read)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
            if group in WEIGHT_GROUPS:
                value.metadata_props[GROUP_METADATA] = group
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def converted(
        self,
        weight: ir.Value,
        conversion: WeightConversion,
        *,
        change: Callable[[Array], Array] | None = None,
        made: Callable[[], Parts] | None = None,
    ) -> list[ir.Value]:
        """Convert a weight [in, out] to another format; return its integers and the other parts.

        `change` turns the initializer into such a weight, if it is none. `made` returns parts that were calibrated.
        """

        def source() -> Array:
            return change(array_of(weight)) if change else array_of(weight)

        shape = source().shape if change else shape_of(weight)
        if len(shape) != 2:
            raise BundleError(f"weight {weight.name}: has shape {shape}, expected [in, out]")
        group, names = group_of(weight), (conversion.form.name, *conversion.others)
        self.changes[f"{weight.name}.{names[0]}"] = Change(
            group=group, original=source, parts=names[1:], restored=lambda *parts: conversion.restored(parts, shape[0])
        )
        waiting: dict[str, Array] = {}

        def read(part: str) -> Array:  # the first read converts the weight
            if part not in waiting:
                waiting.update(zip(names, made() if made else conversion.parts(source()), strict=True))
            return waiting.pop(part) if part == names[0] else waiting[part]  # only the other parts are small

        return [
            self.add(f"{weight.name}.{part}", dtype, sizes, partial(read, part), group)
            for part, (dtype, sizes) in zip(names, conversion.stored(*shape), strict=True)
        ]

    def stacked(self, values: Sequence[ir.Value]) -> ir.Value:
        """Stack the float32 initializers of all experts into one, whose name omits the expert's index."""
        name, shape = _EXPERT_NUMBER.sub("experts.", values[0].name or "", count=1), (len(values), *shape_of(values[0]))
        return self.add(name, ir.DataType.FLOAT, shape, lambda: np.stack([*map(array_of, values)]), group_of(values[0]))
