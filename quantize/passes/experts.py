"""Mixtures of experts in another number format."""

from __future__ import annotations

import onnx_ir as ir

from u2moe.quantize.calibration import ExpertTokens
from u2moe.quantize.config import Recipe
from u2moe.quantize.experts import EXPERT_FORMATS
from u2moe.quantize.experts.int4 import compensated_experts
from u2moe.quantize.experts.layer import check_all_float, expert_layers
from u2moe.quantize.passes.rewrite import Rewrite, new_call, replace
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.mixture import mixture_of


class QuantizeExperts(Rewrite):
    """Before, all mixtures of experts are in float32; afterwards they are in the format `kind`."""

    def __init__(self, kind: str, recipe: Recipe, tokens: ExpertTokens | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.recipe = recipe
        self.tokens = tokens

    def requires(self, model: ir.Model) -> None:
        """All mixtures are in the form that the exporter writes."""
        check_all_float(model)

    def rewrite(self, model: ir.Model, weights: Weights) -> bool:
        """Replace each by a call of the format's function."""
        layers = expert_layers(model)
        for layer in layers:
            model.functions.pop(layer.node.op_identifier(), None)
        for layer in layers:
            if self.tokens is not None and self.kind == "int4":
                made = compensated_experts(layer, weights, self.recipe, self.tokens)
            else:
                made = EXPERT_FORMATS[self.kind](layer, weights, self.recipe)
            inputs = [layer.x, layer.gate, *made.inputs]
            replace(
                model.graph, layer.node, new_call(model, made.function, layer.node, inputs, made.mixture.attributes())
            )
        return bool(layers)

    def ensures(self, model: ir.Model) -> None:
        """All mixtures are in the format that was chosen."""
        for node in model.graph:
            if (mixture := mixture_of(node)) and mixture.weights != self.kind:
                raise ir.passes.PostconditionError(f"node {node.name}: experts are in {mixture.weights}")
