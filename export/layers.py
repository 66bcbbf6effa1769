"""The layers of the network, with their weights, as calls to the ONNX functions in `runtime.graph.layers`."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from u2moe.export.attention import RMSNorm, inverse_frequencies
from u2moe.export.moe import DenseFeedForward, GatedFeedForward, MixtureOfExperts
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.dispatch import float_mixture

Values = Sequence[ir.Value]
MASKED = float(np.finfo(np.float32).min)
"""Added to masked scores. Its exponential is exactly zero, yet a fully masked row does not become NaN."""


def parameter(g: GraphBuilder, name: str, shape: Sequence[int], read: Callable[[], torch.Tensor]) -> ir.Value:
    """Add a weight that `read` supplies when the graph is saved; see `GraphBuilder.weight`."""
    return g.weight(name, shape, lambda: read().detach().to(torch.float32).numpy())


def transposed(g: GraphBuilder, name: str, weight: torch.Tensor, scale: float = 1.0) -> ir.Value:
    """Add a torch weight [out, in], times `scale`, as the right operand [in, out] of a MatMul."""
    return parameter(g, name, (weight.shape[1], weight.shape[0]), lambda: (weight * scale).T)


def vector(g: GraphBuilder, name: str, weight: torch.Tensor, scale: float = 1.0) -> ir.Value:
    """Add a weight, multiplied by `scale`, in its original shape."""
    return parameter(g, name, tuple(weight.shape), lambda: weight * scale)


def linear(g: GraphBuilder, x: ir.Value, layer: nn.Linear | nn.Conv1d, name: str) -> ir.Value:
    """Compute X W^T + b on the last axis. `layer` may also be an equivalent convolution of kernel size 1."""
    with g.scope(name):
        return product(g, x, *affine(g, layer, ""))


def half(g: GraphBuilder, x: ir.Value, layer: nn.Module, *path: str) -> ir.Value:
    """Return the first half of a projection, or the second if `path` ends with "gate", by a product of its own."""
    own = cast("nn.Linear", layer)
    size = own.weight.shape[0] // 2
    rows = slice(size, None) if path[-1] == "gate" else slice(size)
    with g.scope(*path):
        weights = [parameter(g, "weight", (own.weight.shape[1], size), lambda: own.weight[rows].flatten(1).T)]
        if own.bias is not None:
            weights.append(parameter(g, "bias", (size,), lambda: own.bias[rows]))
        return product(g, x, *weights)


def product(g: GraphBuilder, x: ir.Value, weight: ir.Value, *biases: ir.Value) -> ir.Value:
    """Call the function `Linear`: `x` times the weight [in, out], plus the bias if given."""
    return g.call(layers.linear(bias=bool(biases)), x, weight, *biases)[0]


def affine(g: GraphBuilder, layer: nn.Linear | nn.Conv1d, prefix: str, scale: float = 1.0) -> list[ir.Value]:
    """Return a layer's weight [in, out] and, if it has one, its bias, both multiplied by `scale`."""
    weight = transposed(g, f"{prefix}weight", layer.weight.flatten(1), scale)
    return [weight] if layer.bias is None else [weight, vector(g, f"{prefix}bias", layer.bias, scale)]


class Residual:
    """The sum that a block's layers read and add to. A normalisation's call also does the last addition."""

    def __init__(self, g: GraphBuilder, x: ir.Value, *, pre_norm: bool) -> None:
        self.g, self.pre_norm, self._x = g, pre_norm, x
        self._branch: ir.Value | None = None

    def add(self, layer: Callable[[ir.Value], ir.Value], norm: nn.Module, name: str) -> None:
        """Add a layer's output to the sum. Normalise the layer's input if `pre_norm`, otherwise the new sum."""
        self._branch = layer(self.normalized(norm, name) if self.pre_norm else self._x)
        if not self.pre_norm:
            self.normalize(norm, name)

    def add_branch(self, branch: ir.Value, x: ir.Value | None = None) -> None:
        """Add a branch that the caller computed from the sum; if `x` is given, it replaces the sum."""
        self._x, self._branch = self.total if x is None else x, branch

    def normalize(self, norm: nn.Module, name: str) -> None:
        """Replace the residual sum with its normalised value."""
        self._x = self.normalized(norm, name)

    def normalized(self, norm: nn.Module, name: str) -> ir.Value:
        """Return the residual sum after layer or RMS normalisation over the last axis."""
        if self._branch is None or isinstance(norm, RMSNorm):
            return normalization(self.g, self.total, norm, name)
        with self.g.scope(name, group="normalization"):
            function = layers.add_normalization(cast("nn.LayerNorm", norm).eps)
            self._x, y = self.g.call(function, self._x, self._branch, *weight_and_bias(self.g, norm))
        self._branch = None
        return y

    @property
    def total(self) -> ir.Value:
        """The sum."""
        if self._branch is not None:
            self._x, self._branch = self.g.op("Add", self._x, self._branch), None
        return self._x


def normalization(g: GraphBuilder, x: ir.Value, layer: nn.Module, name: str) -> ir.Value:
    """Apply layer or RMS normalisation over the last axis."""
    with g.scope(name, group="normalization"):
        if isinstance(layer, RMSNorm):
            return g.call(layers.rms_normalization(layer.eps), x, vector(g, "weight", 1 + layer.weight))[0]
        return g.call(layers.normalization(cast("nn.LayerNorm", layer).eps), x, *weight_and_bias(g, layer))[0]


def weight_and_bias(g: GraphBuilder, layer: nn.Module, prefix: str = "") -> list[ir.Value]:
    """Add the weight and the bias of a layer, in their original shapes."""
    own = cast("nn.Linear", layer)
    return [vector(g, f"{prefix}weight", own.weight), vector(g, f"{prefix}bias", own.bias)]


def feed_forward(g: GraphBuilder, x: ir.Value, layer: nn.Module, kind: str, name: str, scale: float = 1.0) -> ir.Value:
    """Apply a dense, gated or mixture-of-experts feed-forward layer to [..., dim].

    Its output is multiplied by `scale`, which becomes part of the last weights.
    """
    with g.scope(name, group="feed_forward"):
        if isinstance(layer, MixtureOfExperts):
            return mixture_of_experts(g, x, layer, kind, scale)
        inner = cast("DenseFeedForward", layer)
        bias = inner.w_1.bias is not None
        weights = [*affine(g, inner.w_1, "w_1."), *affine(g, inner.w_2, "w_2.", scale)]
        gates = affine(g, inner.gate, "gate.") if isinstance(inner, GatedFeedForward) else []
        return g.call(layers.feed_forward(kind, bias=bias, gated=bool(gates)), x, *gates, *weights)[0]


def mixture_of_experts(g: GraphBuilder, x: ir.Value, layer: MixtureOfExperts, kind: str, scale: float) -> ir.Value:
    """Apply the router and all experts in one call."""
    experts = [cast("DenseFeedForward", expert) for expert in layer.experts]
    num, top_k, bias = len(experts), layer.num_experts_per_token, experts[0].w_1.bias is not None
    mixture = Mixture(num_experts=num, top_k=top_k, activation=kind, bias=bias)
    with g.scope(group="routers"):
        weights = [transposed(g, "gate.weight", layer.gate.weight)]
    with g.scope(group="experts"):
        for index, expert in enumerate(experts):
            weights += affine(g, expert.w_1, f"experts.{index}.w_1.")
            weights += affine(g, expert.w_2, f"experts.{index}.w_2.", scale)
    return g.call(float_mixture(mixture), x, *weights)[0]


def sinusoids(g: GraphBuilder, positions: ir.Value, dim: int) -> ir.Value:
    """Return the sinusoidal encodings [..., dim] of int64 positions [...]."""
    with g.scope("positional_encoding"):
        return g.call(layers.sinusoids(inverse_frequencies(dim).tolist()), positions)[0]


def mask_bias(g: GraphBuilder, visible: ir.Value) -> ir.Value:
    """Return the bias to add to scores: 0 where `visible` is true, `MASKED` elsewhere."""
    return g.op("Where", visible, 0.0, MASKED)
