"""A graph that holds each quantized layer a second time, less quantized, and computes the one that a switch chooses.

One session so measures every combination of layers: nothing is written or loaded again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.names import layer_of
from u2moe.quantize.routing import load_graph
from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.graph.builder import define

Array = npt.NDArray[Any]
SWITCHES = "switches"
"""Name of the input that tells of each layer whether it is quantized: bool [layers]."""


class SwitchedGraph:
    """A quantized graph with a switch for each layer that differs from another version of the graph.

    Attributes:
        layers: names of these layers, in order.
        bytes: by layer, the bytes of its weights in the other version and quantized.
        inputs: by layer, the names of the values that its products read.
        outputs: by layer, the names of the values that it gives.
    """

    def __init__(self, other: ir.Model, quantized: ir.Model) -> None:
        """Both are versions of one graph, and are changed."""
        self._model, self._other = quantized, other
        self._switches = ir.val(SWITCHES, dtype=ir.DataType.BOOL, shape=("layers",))
        quantized.graph.inputs.append(self._switches)
        quantized.graph.opset_imports.update({**other.graph.opset_imports, **quantized.graph.opset_imports})
        self.layers: list[str] = []
        self.bytes: dict[str, tuple[int, int]] = {}
        self.inputs: dict[str, list[str]] = {}
        self.outputs: dict[str, list[str]] = {}
        self._values = {value.name: value for node in quantized.graph for value in node.outputs}
        self._values |= {value.name: value for value in quantized.graph.inputs}
        calls = {node.outputs[0].name: node for node in other.graph if node.domain == MOE_DOMAIN}
        for node in list(quantized.graph):
            call = calls.get(node.outputs[0].name) if node.domain == MOE_DOMAIN else None
            if call is not None and _weight_names(call) != _weight_names(node):
                self._describe(call, node)
                self._switch(call, node)
        self._outputs = [str(value.name) for value in quantized.graph.outputs]

    def _describe(self, call: ir.Node, node: ir.Node) -> None:
        layer = layer_of(call)
        if layer not in self.bytes:
            self.layers.append(layer)
            self.bytes[layer], self.inputs[layer], self.outputs[layer] = (0, 0), [], []
        before, after = self.bytes[layer]
        self.bytes[layer] = before + _weight_bytes(call), after + _weight_bytes(node)
        self.inputs[layer] += [str(value.name) for value in call.inputs[:1] if value is not None]
        self.outputs[layer] += [str(value.name) for value in node.outputs]

    def _switch(self, call: ir.Node, node: ir.Node) -> None:
        """Put If between a node and the call of the other version; what reads the node reads the If."""
        graph, name = self._model.graph, f"{node.name}/If"
        names = [value.name for value in node.outputs]
        chosen = ir.node(
            "Gather", [self._switches, self._number(node, layer_of(call))], {"axis": 0}, name=f"{name}/switch"
        )
        chosen.outputs[0].name = chosen.name
        branch = ir.Node("", "If", chosen.outputs, num_outputs=len(names), name=name)
        graph.insert_before(node, [chosen, branch])
        ir.convenience.replace_all_uses_with(list(node.outputs), branch.outputs)
        graph.remove(node)
        for key, inner in (("then_branch", node), ("else_branch", self._copied(call))):
            for value, outer in zip(inner.outputs, names, strict=True):
                value.name = f"{outer}/{key}"
            branch.attributes[key] = ir.AttrGraph(key, ir.Graph([], inner.outputs, nodes=[inner], name=f"{name}/{key}"))
        for value, outer in zip(branch.outputs, names, strict=True):
            value.name = outer
            self._values[outer] = value

    def _number(self, node: ir.Node, layer: str) -> ir.Value:
        number = ir.node(
            "Constant", [], {"value": ir.tensor(np.int64(self.layers.index(layer)))}, name=f"{node.name}/number"
        )
        number.outputs[0].name = number.name
        self._model.graph.insert_before(node, number)
        return number.outputs[0]

    def _copied(self, call: ir.Node) -> ir.Node:
        """A call of the other version in this graph, with its function and its weights."""
        function = define(self._model.functions, self._other.functions[call.op_identifier()])
        inputs = [None if value is None else self._value(value) for value in call.inputs]
        attributes = list(call.attributes.values())
        num_outputs = len(call.outputs)
        return ir.Node(
            call.domain, function.name, inputs, attributes, num_outputs=num_outputs, name=f"{call.name}/other"
        )

    def _value(self, value: ir.Value) -> ir.Value:
        """The value of that name in this graph; of weights, whose names may mean others here, a copy."""
        if value.const_value is None:
            return self._values[value.name]
        name = f"{value.name}/other"
        if name not in self._model.graph.initializers:
            copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            self._model.graph.register_initializer(copy)
        return self._model.graph.initializers[name]

    def record(self, names: Collection[str]) -> None:
        """Make values of float32 outputs, before the first run."""
        for name in names:
            value = self._values[name]
            if not value.is_graph_output():
                value.type = ir.TensorType(ir.DataType.FLOAT)
                self._model.graph.outputs.append(value)

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return load_graph(self._model)

    def run(
        self, feeds: Mapping[str, Array], quantized: Collection[str], names: Sequence[str] = ()
    ) -> dict[str, Array]:
        """The graph's outputs and the recorded values of these names, with these layers quantized and no others."""
        switches = np.array([layer in quantized for layer in self.layers], np.bool_)
        wanted = [*self._outputs, *names]
        return dict(zip(wanted, self._session.run(wanted, {**feeds, SWITCHES: switches}), strict=True))


def _weight_bytes(node: ir.Node) -> int:
    weights = [value.const_value for value in node.inputs if value is not None]
    return sum(weight.nbytes for weight in weights if weight is not None)


def _weight_names(node: ir.Node) -> list[str | None]:
    return [value.name for value in node.inputs if value is not None and value.const_value is not None]
