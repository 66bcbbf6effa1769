"""The mixtures of experts of a float32 graph, and their replacements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import shape_of
from u2moe.runtime.graph.layers import PLAIN_LAYERS


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """One mixture of experts in a float32 graph.

    Attributes:
        node: the call of the model-local function.
        mixture: its description.
        x: the layer's input [..., dim].
        gate: the router's weight [dim, experts].
        w1: first weight [dim, hidden] of each expert; `w2`: second [hidden, dim].
        b1: first bias [hidden] of each; `b2`: second [dim]; empty if the layer has no biases.
    """

    node: ir.Node
    mixture: Mixture
    x: ir.Value
    gate: ir.Value
    w1: Sequence[ir.Value]
    b1: Sequence[ir.Value]
    w2: Sequence[ir.Value]
    b2: Sequence[ir.Value]

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of inputs and of hidden units of an expert."""
        dim, hidden = shape_of(self.w1[0])
        return dim, hidden


def expert_layers(model: ir.Model) -> list[ExpertLayer]:
    """The float32 mixtures of experts of a graph, in order.

    Raises:
        BundleError: one of them is not in the form that the exporter writes.
    """
    layers = []
    for node in model.graph:
        mixture = _mixture(node)
        if mixture is None or mixture.weights != "fp32":
            continue
        values = [value for value in node.inputs if value is not None]
        parts = 4 if mixture.bias else 2
        if len(values) != len(node.inputs) or len(values) != 2 + parts * mixture.num_experts:
            raise BundleError(f"node {node.name}: {node.op_type} with {len(values)} inputs is not a mixture of experts")
        x, gate, *weights = values
        w1, w2 = weights[::parts], weights[parts // 2 :: parts]
        b1, b2 = (weights[1::parts], weights[3::parts]) if mixture.bias else ([], [])
        layers.append(ExpertLayer(node=node, mixture=mixture, x=x, gate=gate, w1=w1, b1=b1, w2=w2, b2=b2))
    return layers


def check_all_float(model: ir.Model) -> None:
    """Raise a BundleError unless all layers of a graph are in float32, and of kinds that the exporter writes."""
    calls = [(node, _mixture(node)) for node in model.graph if node.domain == contract.MOE_DOMAIN]
    for node, mixture in sorted(calls, key=lambda call: call[1] is None):  # mixtures first, which say most
        if plain_name(node.op_type) not in PLAIN_LAYERS if mixture is None else mixture.weights != "fp32":
            raise BundleError(f"node {node.name}: {node.op_type} is not a layer in float32")


def _mixture(node: ir.Node) -> Mixture | None:
    try:
        return mixture_of(node)
    except ValueError as error:
        raise BundleError(f"node {node.name}: {error}") from error
