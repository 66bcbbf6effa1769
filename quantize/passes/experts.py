"""Mixtures of experts in another number format."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from u2moe.quantize.calibration import ExpertTokens
from u2moe.quantize.config import Recipe
from u2moe.quantize.experts import EXPERT_FORMATS
from u2moe.quantize.experts.int4 import compensated_experts
from u2moe.quantize.experts.layer import ExpertLayer, check_all_float, expert_layers
from u2moe.quantize.passes.rewrite import Rewrite, new_call, replace
from u2moe.quantize.weights import Weights
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.mixture import mixture_of


class QuantizeExperts(Rewrite):
    """Before, all mixtures of experts are in float32; afterwards they are in the format `kind`.

    The last ones are in int8 if the recipe has a share for them.
    """

    def __init__(self, kind: str, recipe: Recipe, tokens: ExpertTokens | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.recipe = recipe
        self.tokens = tokens
        self.kinds: list[str] = []

    def requires(self, model: ir.Model) -> None:
        """All mixtures are in the form that the exporter writes, and the recipe's share holds one of them."""
        check_all_float(model)
        self.kinds = self.formats(expert_layers(model))

    def formats(self, layers: Sequence[ExpertLayer]) -> list[str]:
        """The format of each layer."""
        num_int8 = num_last(layers, self.recipe.int8_share)
        return [self.kind] * (len(layers) - num_int8) + ["int8"] * num_int8

    def rewrite(self, model: ir.Model, weights: Weights) -> bool:
        """Replace each by a call of the format's function."""
        layers = expert_layers(model)
        for layer in layers:
            model.functions.pop(layer.node.op_identifier(), None)
        for layer, kind in zip(layers, self.kinds, strict=True):
            if self.tokens is not None and kind == "int4":
                made = compensated_experts(layer, weights, self.recipe, self.tokens)
            else:
                made = EXPERT_FORMATS[kind](layer, weights, self.recipe)
            inputs = [layer.x, layer.gate, *made.inputs]
            replace(
                model.graph, layer.node, new_call(model, made.function, layer.node, inputs, made.mixture.attributes())
            )
        return bool(layers)

    def ensures(self, model: ir.Model) -> None:
        """All mixtures are in the formats that were chosen."""
        found = [(node, mixture) for node in model.graph if (mixture := mixture_of(node))]
        for (node, mixture), kind in zip(found, self.kinds, strict=True):
            if mixture.weights != kind:
                raise ir.passes.PostconditionError(f"node {node.name}: experts are in {mixture.weights}")


def num_last(layers: Sequence[ExpertLayer], share: float) -> int:
    """The number of last layers that have at most this share of the weights of all layers together.

    Raises:
        BundleError: the share is not 0, but too small for the last layer.
    """
    if not share:
        return 0
    sizes = [math.prod(layer.sizes) * layer.mixture.num_experts for layer in layers]
    if not sizes:
        raise BundleError(f"int8_share {share:g} is for experts of the encoder, which has none")
    limit = share * sum(sizes) * (1 + 1e-9)  # a share of 0.3 means three layers of ten
    count = sum(sum(sizes[start:]) <= limit for start in range(len(sizes)))
    if not count:
        least = sizes[-1] / sum(sizes)
        raise BundleError(
            f"int8_share {share:g} is too small for a layer: expected at least {least:.3g}, which the last of "
            f"{len(sizes)} layers has of the encoder's expert weights"
        )
    return count
