"""Half precision for the whole graph but what needs more: routers, positions, and log-probabilities stay float32."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from u2moe.quantize import experts
from u2moe.quantize.rewrites import MOE_FUNCTION, Change
from u2moe.runtime import contract
from u2moe.runtime.errors import BundleError

POSITIONS = "positional_encoding/"
"""Scope of the sinusoids: half precision counts exactly to 2048 only."""
LARGEST = float(np.finfo(np.float16).max)


def to_half(model: ir.Model, skip_below: float = 0.0) -> dict[str, Change]:
    """Turn a float32 graph of ours into half precision in place; inputs and outputs stay float32.

    Args:
        model: changed.
        skip_below: tokens skip experts whose weight is below it, see `Recipe.skip_expert_below`.

    Returns:
        What was replaced, by the name of the new weight.

    Raises:
        BundleError: a mixture of experts that is not as the exporter writes it.
    """
    converter = _Converter(model, skip_below)
    converter.run()
    return converter.changes


class _Converter:
    def __init__(self, model: ir.Model, skip_below: float) -> None:
        self.model = model
        self.skip_below = skip_below
        self.graph = model.graph
        self.changes: dict[str, Change] = {}
        self.halves: dict[ir.Value, ir.Value] = {}
        """Half-precision twin of a float32 input, weight or position."""
        self.single: set[ir.Value] = set()
        """Values that are float32 for good: those computed from log-probabilities."""

    def run(self) -> None:
        """All nodes in order, then the outputs."""
        for node in list(self.graph):
            if POSITIONS in (node.name or ""):
                continue
            if node.op_type == "LogSoftmax":
                self._cast_before(node, 0, ir.DataType.FLOAT)
                self.single.update(node.outputs)
            elif any(value in self.single for value in node.inputs):
                self.single.update(node.outputs)
            else:
                self._convert(node)
        for output in self.graph.outputs:
            producer = output.producer()
            if producer is not None and output.dtype == ir.DataType.FLOAT and producer.inputs[0] not in self.single:
                self._cast_before(producer, 0, ir.DataType.FLOAT)
        self.graph.opset_imports.update({contract.MOE_DOMAIN: 1})
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]

    def _convert(self, node: ir.Node) -> None:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        for index, value in enumerate(node.inputs):
            if value is not None and self._is_single(value) and not self._is_router(node, index):
                node.replace_input_with(index, self._half(value))
        if node.domain == contract.MOE_DOMAIN:
            self._mixture_of_experts(node)

    @staticmethod
    def _is_router(node: ir.Node, index: int) -> bool:
        return node.domain == contract.MOE_DOMAIN and index == 1

    def _is_single(self, value: ir.Value) -> bool:
        """Whether a value is float32 although its reader wants half precision: a weight, an input, or positions."""
        producer = value.producer()
        if producer is not None:
            return POSITIONS in (producer.name or "") and producer.op_type == "Reshape"
        return value.dtype == ir.DataType.FLOAT

    def _half(self, value: ir.Value) -> ir.Value:
        if value not in self.halves:
            self.halves[value] = self._half_weight(value) if value.const_value is not None else self._cast(value)
        return self.halves[value]

    def _half_weight(self, value: ir.Value) -> ir.Value:
        tensor, name = value.const_value, f"{value.name}.fp16"
        if tensor is None:
            raise BundleError(f"weight {value.name}: has no value")

        def load() -> ir.TensorProtocol:
            # what masks scores is the smallest float32, which half precision would call infinite
            return ir.tensor(np.clip(tensor.numpy(), -LARGEST, LARGEST).astype(np.float16), name=name)

        group = contract.weight_group(value.name or "")
        self.changes[name] = Change(group=group, format="fp16", original=lambda: tensor.numpy().astype(np.float32))
        lazy = ir.LazyTensor(load, ir.DataType.FLOAT16, ir.Shape(tensor.numpy().shape), name=name)
        half = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT16), shape=lazy.shape, const_value=lazy)
        self.graph.register_initializer(half)
        return half

    def _cast(self, value: ir.Value) -> ir.Value:
        node = ir.Node("", "Cast", [value], {"to": ir.AttrInt64("to", ir.DataType.FLOAT16)}, num_outputs=1)
        node.name = node.outputs[0].name = f"{value.name}/half"
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(next(iter(self.graph)), node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def _cast_before(self, node: ir.Node, index: int, dtype: ir.DataType) -> None:
        cast = ir.Node("", "Cast", [node.inputs[index]], {"to": ir.AttrInt64("to", dtype)}, num_outputs=1)
        cast.name = cast.outputs[0].name = f"{node.name}/single"
        self.graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])

    def _mixture_of_experts(self, node: ir.Node) -> None:
        match = re.match(MOE_FUNCTION, node.op_type)
        if match is None:
            raise BundleError(f"node {node.name}: {node.op_type} is no mixture of experts of this version")
        top_k, num_experts, has_bias = int(match[1]), int(match[2]), match[4] is None
        skip_below = self.skip_below if top_k > 1 else 0.0
        function = experts.float_mixture_of_experts(
            num_experts, top_k, match[3], has_bias=has_bias, skip_below=skip_below, half=True
        )
        self.model.functions.setdefault(function.identifier(), function)
        self.model.functions.pop((node.domain, node.op_type, ""), None)
        node.op_type = function.name
