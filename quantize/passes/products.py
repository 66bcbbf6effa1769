"""Products with weights as integer products, with one activation scale per token (`token_scales`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from u2moe.quantize.passes.rewrite import Rewrite, present
from u2moe.quantize.token_scales import QuantizedRows, activation_of
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.file import group_of


class QuantizeProducts(Rewrite):
    """Afterwards no activation is multiplied by a float32 weight of these groups."""

    def __init__(self, groups: Collection[str]) -> None:
        super().__init__()
        self.groups = groups

    def rewrite(self, model: ir.Model, weights: Weights) -> bool:
        """Replace each product; an input shared by several of them is quantized once."""
        rows = QuantizedRows(model)
        nodes = list(self._products(model))
        for node in nodes:
            rows.multiply(node, weights.int8(present(node, 1)), activation_of(present(node, 0)))
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
