"""The layers of the network, with their weights, as calls to the ONNX functions in `runtime.graph`."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from u2moe.export.attention import MultiHeadAttention, RMSNorm, inverse_frequencies
from u2moe.export.moe import DenseFeedForward, GatedFeedForward, MixtureOfExperts
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.attention import Heads, PositionUse, attention, cached_attention
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.dispatch import float_mixture

Values = Sequence[ir.Value]
MASKED = float(np.finfo(np.float32).min)  # its exponential is exactly zero, yet a fully masked row is not NaN


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
    """Apply a feed-forward layer of any kind to [..., dim]. `scale`, a factor of the output, is part of its weights."""
    with g.scope(name, group="feed_forward"):
        if isinstance(layer, MixtureOfExperts):
            experts = [cast("DenseFeedForward", expert) for expert in layer.experts]
            num, top_k, bias = len(experts), layer.num_experts_per_token, experts[0].w_1.bias is not None
            with g.scope(group="routers"):
                weights = [transposed(g, "gate.weight", layer.gate.weight)]
            with g.scope(group="experts"):
                for index, expert in enumerate(experts):
                    weights += affine(g, expert.w_1, f"experts.{index}.w_1.")
                    weights += affine(g, expert.w_2, f"experts.{index}.w_2.", scale)
            mixture = Mixture(num_experts=num, top_k=top_k, activation=kind, bias=bias)
            return g.call(float_mixture(mixture), x, *weights)[0]
        inner = cast("DenseFeedForward", layer)
        bias = inner.w_1.bias is not None
        weights = [*affine(g, inner.w_1, "w_1."), *affine(g, inner.w_2, "w_2.", scale)]
        gates = affine(g, inner.gate, "gate.") if isinstance(inner, GatedFeedForward) else []
        return g.call(layers.feed_forward(kind, bias=bias, gated=bool(gates)), x, *gates, *weights)[0]


def sinusoids(g: GraphBuilder, positions: ir.Value, dim: int) -> ir.Value:
    """Return the sinusoidal encodings [..., dim] of int64 positions [...]."""
    with g.scope("positional_encoding"):
        return g.call(layers.sinusoids(inverse_frequencies(dim).tolist()), positions)[0]


def mask_bias(g: GraphBuilder, visible: ir.Value) -> ir.Value:
    """Return the bias to add to scores: 0 where `visible` is true, `MASKED` elsewhere."""
    return g.op("Where", visible, 0.0, MASKED)


class AttentionNodes:
    """One attention layer. The encoder or decoder that contains it supplies the caches and masks.

    WeNet computes the scores of relative attention as ((q_i + u) k_j + (q_i + v) p_j) / s with p_j = W_pos pe_j. Here
    they are (q_i + u) / s * (k_j + p_j) + (v - u) / s * p_j. This form needs one product with the queries instead of
    two. Its second term depends only on the position of the key (see `position_biases`). u and the division by s are
    folded into the query projection.
    """

    def __init__(self, g: GraphBuilder, layer: MultiHeadAttention) -> None:
        self.g, self.layer, self.config = g, layer, (config := layer.config)
        self.heads = Heads(num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, size=config.head_dim)

    def attend(
        self, x: ir.Value, memory: ir.Value, bias: ir.Value, positions: Values = (), cache: Values = ()
    ) -> tuple[ir.Value, ...]:
        """Attend from `x` [batch, time, dim] to `memory` [batch, keys, dim]; return the output and what to cache.

        `bias` is added to the scores. `positions` is the result of `positions.encoding_nodes` for the keys. `cache`
        contains the inputs `cache`, `block` and `first_kept` of `cached_attention`; if it is empty, nothing is cached.
        """
        key_value = self.key_value(memory)
        use: PositionUse = ""
        if self.config.relative and positions:
            use, positions = "relative", [linear(self.g, positions[0], self.layer.linear_pos, "linear_pos")]
        elif self.config.rotary:
            use = "rotary"
        elif self.config.by_distance:
            use, positions = "distance", [vector(self.g, "rel_k_embed.weight", self.layer.rel_k_embed.weight)]
        else:
            positions = []
        function = (cached_attention if cache else attention)(self.heads, use)
        context, *kept = self.g.call(function, self._query(x), key_value, *cache, bias, *positions)
        return linear(self.g, context, self.layer.linear_out, "linear_out"), *kept

    def gathered(
        self, x: ir.Value, memory: ir.Value | None, bias: ir.Value, rows: ir.Value, places: ir.Value
    ) -> ir.Value:
        """Attend from vectors `x` [n, dim]; return [n, dim].

        `rows` [batch, time] contains the index of the vector that forms each query. `places` [n] contains the index of
        each vector in the flattened queries. Without `memory`, the queries attend to each other.
        """
        g = self.g
        query = g.op("Gather", self._query(x), rows, axis=0)
        key_value = self.key_value(x if memory is None else memory)
        if memory is None:
            key_value = g.op("Gather", key_value, rows, axis=0)
        (context,) = g.call(attention(self.heads), query, key_value, bias)
        flat = g.op("Reshape", context, [-1, self.heads.num_heads * self.heads.size])
        return linear(g, g.op("Gather", flat, places, axis=0), self.layer.linear_out, "linear_out")

    def _query(self, x: ir.Value) -> ir.Value:
        g, layer, scale = self.g, self.layer, 1 / math.sqrt(self.config.head_dim)
        parts = [] if layer.linear_q.bias is None else [layer.linear_q.bias]
        parts += [layer.pos_bias_u] if self.config.relative else []

        def bias() -> torch.Tensor:
            return torch.stack([part.flatten() for part in parts]).sum(dim=0) * scale

        with g.scope("linear_q"):
            weight = transposed(g, "weight", layer.linear_q.weight, scale)
            biases = [parameter(g, "bias", (layer.linear_q.out_features,), bias)] if parts else []
            return product(g, x, weight, *biases)

    def key_value(self, x: ir.Value) -> ir.Value:
        """Return keys and values [batch, time, kv_heads * 2 * head_dim], head by head, in the layout of the cache."""
        g, layer, config = self.g, self.layer, self.config
        width = 2 * config.num_kv_heads * config.head_dim

        def joined(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            parts = [part.reshape(-1, config.head_dim, *part.shape[1:]) for part in (keys, values)]
            return torch.cat(parts, dim=1).flatten(0, 1)

        def bias() -> torch.Tensor:
            none = torch.zeros(width // 2)
            parts = [part.bias for part in (layer.linear_k, layer.linear_v)]
            return joined(*(none if part is None else part.float() for part in parts))

        with g.scope("linear_kv"):
            shape = (layer.linear_k.in_features, width)
            weights = [parameter(g, "weight", shape, lambda: joined(layer.linear_k.weight, layer.linear_v.weight).T)]
            if any(part.bias is not None for part in (layer.linear_k, layer.linear_v)):
                weights.append(parameter(g, "bias", (width,), bias))
            return product(g, x, *weights)


def position_biases(g: GraphBuilder, positions: ir.Value, layers: Sequence[MultiHeadAttention]) -> ir.Value:
    """Return the last term in `AttentionNodes` [batch, layers * heads, 1, keys], by one product with the sinusoids."""
    shape = (layers[0].linear_pos.in_features, len(layers) * layers[0].config.num_heads)
    with g.scope("position_biases", group="positions"):
        weight = parameter(g, "weight", shape, lambda: torch.cat(list(map(_position_bias, layers))).T)
        return g.op("Unsqueeze", g.op("Transpose", product(g, positions, weight), perm=[0, 2, 1]), [2])


def _position_bias(layer: MultiHeadAttention) -> torch.Tensor:
    """Return (v - u)^T W_pos / sqrt(head_dim) of each head [heads, dim]."""
    # in a fixed order of summation, because the order in torch's products depends on the processor
    difference = (layer.pos_bias_v.double() - layer.pos_bias_u.double()) / math.sqrt(layer.config.head_dim)
    projection = layer.linear_pos.weight.double().reshape(*difference.shape, -1)
    total = torch.zeros_like(projection[:, 0])
    for index in range(layer.config.head_dim):
        total = total + difference[:, index, None] * projection[:, index]
    return total.float()
