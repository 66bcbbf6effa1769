"""Products with weights as integer products, with one activation scale per token (`token_scales`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from u2moe.quantize.passes.quantized_rows import QuantizedRows, activation_of, feed_forward_of
from u2moe.quantize.passes.rewrite import Rewrite, present
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.file import group_of

_WITH_KNOWN_LOWEST = ("relu", "swish")
"""Activations whose lowest value is used for the scale of a product alone."""


class QuantizeProducts(Rewrite):
    """Afterwards no activation is multiplied by a float32 weight of these groups."""

    def __init__(self, groups: Collection[str]) -> None:
        super().__init__()
        self.groups = groups

    def rewrite(self, model: ir.Model, weights: Weights) -> bool:
        """Replace each feed-forward layer and each other product; an input shared by several is quantized once."""
        nodes = list(self._products(model))
        rows = QuantizedRows(model, nodes)
        done: set[ir.Node] = set()
        for node in nodes:
            layer = feed_forward_of(node)
            if layer is not None and all(product in nodes for product in layer.products):
                rows.feed_forward(layer, [weights.int8(present(product, 1)) for product in layer.products])
                done |= set(layer.products)
        for node in nodes:
            if node not in done:
                kind, _ = activation_of(present(node, 0))
                rows.multiply(node, weights.int8(present(node, 1)), kind if kind in _WITH_KNOWN_LOWEST else None)
        return bool(nodes)

    def ensures(self, model: ir.Model) -> None:
        """No such product is left."""
        for node in self._products(model):
            raise ir.passes.PostconditionError(f"node {node.name}: its weight is in float32")

    def _products(self, model: ir.Model) -> Iterator[ir.Node]:
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            if weight is not None and weight.const_value is not None and group_of(weight) in self.groups:
                yield node
