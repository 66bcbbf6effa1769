"""A graph that holds each layer in several formats, and computes those that switches choose.

One session so measures every combination of layers: nothing is written or loaded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from u2moe.quantize.layers import layer_of
from u2moe.quantize.observed import Array, ObservedGraph
from u2moe.quantize.recipes import FORMATS
from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.graph.builder import define
from u2moe.runtime.graph.file import group_of

Levels = Mapping[str, int]
"""By layer, the number of the version that it is computed in."""
SWITCHES = "switches"
"""Name of the input that says whether each layer has a level, or a later one: bool [layers * versions]."""


class SwitchedGraph(ObservedGraph):
    """Versions of a graph with a switch for each layer in which they differ.

    A layer's level is the number of a version, 0 for the first.

    Attributes:
        bytes: by layer, in order, the bytes of its weights at each level. Layers that the last versions have in common
            have fewer levels.
        groups: by layer, the group of its weights, see `recipes.FORMATS`.
        inputs: by layer, the names of the values that its products read.
        outputs: by layer, the names of the values that it gives; what layers read and give can be seen.
        levels: those of the next run; layers that are not named: 0.
    """

    def __init__(self, *versions: ir.Model) -> None:
        """Two or more that `read_single` reads, which are changed.

        Of three, the second must have all values that layers of the others read.
        """
        self._versions, self._model = versions, versions[1]
        self._switches = ir.val(SWITCHES, dtype=ir.DataType.BOOL, shape=("layers",))
        for version in versions:
            for domain, number in version.graph.opset_imports.items():
                self._model.graph.opset_imports.setdefault(domain, number)
        self._num_added = 0
        self.bytes: dict[str, list[int]] = {}
        self.groups: dict[str, str] = {}
        self.inputs: dict[str, list[str]] = {}
        self.outputs: dict[str, list[str]] = {}
        self._values = {value.name: value for node in self._model.graph for value in node.outputs}
        self._values |= {value.name: value for value in self._model.graph.inputs}
        found = [
            {node.outputs[0].name: node for node in version.graph if node.domain == MOE_DOMAIN} for version in versions
        ]
        calls = {name: [own[name] for own in found] for name in found[0] if all(name in own for own in found[1:])}
        for options in calls.values():
            while len(options) > 1 and _weight_names(options[-1]) == _weight_names(options[-2]):
                options.pop()
            if len(options) > 1:
                self._describe(options)
                self._switch(options)
        self.levels: Levels = {}
        names = dict.fromkeys(name for own in (*self.inputs.values(), *self.outputs.values()) for name in own)
        super().__init__(self._model, [self._values[name] for name in names])
        if self.bytes:
            self._model.graph.inputs.append(self._switches)

    def _describe(self, options: Sequence[ir.Node]) -> None:
        layer, sizes = layer_of(options[0]), [_weight_bytes(node) for node in options]
        known = self.bytes.setdefault(layer, [])
        num_levels = max(len(known), len(sizes))
        padded = [[*own, *own[-1:] * num_levels][:num_levels] if own else [0] * num_levels for own in (known, sizes)]
        self.bytes[layer] = [sum(pair) for pair in zip(*padded, strict=True)]
        weights = [value for value in options[0].inputs if value is not None and value.const_value is not None]
        self.groups.setdefault(layer, next(filter(FORMATS.__contains__, map(group_of, weights)), "other"))
        read = self.inputs.setdefault(layer, [])
        read += [str(x.name) for x in options[0].inputs[:1] if x is not None and x.const_value is None]
        self.outputs.setdefault(layer, []).extend(str(value.name) for value in options[0].outputs)

    def _switch(self, options: Sequence[ir.Node]) -> None:
        """Put a choice between the calls of all levels in place of the one in the graph."""
        graph, node = self._model.graph, options[1]
        names = [str(value.name) for value in node.outputs]
        # The last comes first: within two Ifs, onnxruntime packs no weights, and MatMulNBits then rounds otherwise.
        first, conditions = list(self.bytes).index(layer_of(options[0])) * len(self._versions), []
        for level in range(len(options) - 1, 0, -1):
            number = self._before(node, "Constant", [], value=ir.tensor(first + level))
            conditions.append(self._before(node, "Gather", [self._switches, number], axis=0))
        branch = ir.Node("", "If", conditions[:1], num_outputs=len(names), name=f"{node.name}/If")
        graph.insert_before(node, branch)
        ir.convenience.replace_all_uses_with(list(node.outputs), branch.outputs)
        graph.remove(node)
        inside = [option if option is node else self._copied(option, index) for index, option in enumerate(options)]
        self._fill(branch, inside[::-1], conditions)
        for value, outer in zip(branch.outputs, names, strict=True):
            value.name = outer
            self._values[outer] = value

    def _before(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """The output of a new node in front of another."""
        self._num_added += 1
        added = ir.node(op_type, inputs, attributes, name=f"{node.name}/{op_type}_{self._num_added}")
        added.outputs[0].name = added.name
        self._model.graph.insert_before(node, added)
        return added.outputs[0]

    def _fill(self, branch: ir.Node, options: Sequence[ir.Node], conditions: Sequence[ir.Value]) -> None:
        """Make an If compute the first option whose condition holds, or the last."""
        other = options[1]
        if len(options) > 2:
            num_outputs = len(branch.outputs)
            other = ir.Node("", "If", conditions[1:2], num_outputs=num_outputs, name=f"{branch.name}/If")
            self._fill(other, options[1:], conditions[1:])
        for key, inner in (("then_branch", options[0]), ("else_branch", other)):
            for index, value in enumerate(inner.outputs):
                value.name = f"{branch.name}/{key}:{index}"
            content = ir.Graph([], inner.outputs, nodes=[inner], name=f"{branch.name}/{key}")
            branch.attributes[key] = ir.AttrGraph(key, content)

    def _copied(self, call: ir.Node, level: int) -> ir.Node:
        """A call of another version in this graph, with its function and its weights."""
        function = define(self._model.functions, self._versions[level].functions[call.op_identifier()])
        inputs = [None if value is None else self._value(value, level) for value in call.inputs]
        attributes = list(call.attributes.values())
        name = f"{call.name}/{level}"
        return ir.Node(call.domain, function.name, inputs, attributes, num_outputs=len(call.outputs), name=name)

    def _value(self, value: ir.Value, level: int) -> ir.Value:
        """The value of that name in this graph; of weights, whose names may mean others here, a copy."""
        if value.const_value is None:
            return self._values[value.name]
        name = f"{value.name}/{level}"
        if name not in self._model.graph.initializers:
            copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            self._model.graph.register_initializer(copy)
        return self._model.graph.initializers[name]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`, at `levels`."""
        levels = np.array([self.levels.get(layer, 0) for layer in self.bytes])
        switches = (levels[:, np.newaxis] >= np.arange(len(self._versions))).ravel()
        return super().run({**feeds, SWITCHES: switches} if self.bytes else feeds)


def _weight_bytes(node: ir.Node) -> int:
    weights = [value.const_value for value in node.inputs if value is not None]
    return sum(weight.nbytes for weight in weights if weight is not None)


def _weight_names(node: ir.Node) -> list[str | None]:
    return [value.name for value in node.inputs if value is not None and value.const_value is not None]
