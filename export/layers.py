"""The layers of the network as ONNX nodes: one function per layer of `model` and `moe`, reading its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from u2moe.export.architecture import Activation
from u2moe.export.attention import MultiHeadAttention, RMSNorm, inverse_frequencies
from u2moe.export.moe import DenseFeedForward, GatedFeedForward, MixtureOfExperts
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import Heads, context, to_heads
from u2moe.runtime.graph.builder import GraphBuilder, define
from u2moe.runtime.graph.mixture import float_mixture

MASKED = float(np.finfo(np.float32).min)
"""Added to masked scores: its exponential is exactly zero, yet a fully masked row does not become NaN."""


def parameter(g: GraphBuilder, name: str, shape: Sequence[int], read: Callable[[], torch.Tensor]) -> ir.Value:
    """A weight that `read` supplies when the graph is saved; see `GraphBuilder.weight`."""
    return g.weight(name, shape, lambda: read().detach().to(torch.float32).numpy())


def transposed(g: GraphBuilder, name: str, weight: torch.Tensor, scale: float = 1.0) -> ir.Value:
    """A torch weight [out, in], times `scale`, as the right operand of MatMul [in, out]."""
    return parameter(g, name, (weight.shape[1], weight.shape[0]), lambda: _scaled(weight, scale).T)


def vector(g: GraphBuilder, name: str, weight: torch.Tensor, scale: float = 1.0) -> ir.Value:
    """A weight as it is, times `scale`."""
    return parameter(g, name, tuple(weight.shape), lambda: _scaled(weight, scale))


def _scaled(weight: torch.Tensor, scale: float) -> torch.Tensor:
    return weight if scale == 1 else weight * scale


def linear(g: GraphBuilder, x: ir.Value, layer: nn.Linear, name: str, scale: float = 1.0) -> ir.Value:
    """X W^T + b on the last axis, times `scale`, which is folded into the weights."""
    with g.scope(name):
        y = g.op("MatMul", x, transposed(g, "weight", layer.weight, scale))
        return y if layer.bias is None else g.op("Add", y, vector(g, "bias", layer.bias, scale))


def pointwise_convolution(g: GraphBuilder, x: ir.Value, layer: nn.Conv1d, name: str) -> ir.Value:
    """A convolution of kernel 1 over [batch, time, channels], which is a matrix multiplication."""
    with g.scope(name):
        y = g.op("MatMul", x, transposed(g, "weight", layer.weight.squeeze(2)))
        return y if layer.bias is None else g.op("Add", y, vector(g, "bias", layer.bias))


def normalization(g: GraphBuilder, x: ir.Value, layer: nn.Module, name: str) -> ir.Value:
    """Layer or RMS normalisation over the last axis."""
    with g.scope(name, group="normalization"):
        if isinstance(layer, RMSNorm):
            mean_square = g.op("ReduceMean", g.op("Mul", x, x), [-1], keepdims=1)
            x = g.op("Div", x, g.op("Sqrt", g.op("Add", mean_square, layer.eps)))
            return g.op("Mul", x, parameter(g, "weight", tuple(layer.weight.shape), lambda: 1 + layer.weight))
        layer_norm = cast("nn.LayerNorm", layer)
        weight, bias = vector(g, "weight", layer_norm.weight), vector(g, "bias", layer_norm.bias)
        return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=layer_norm.eps)


def scale_and_shift(layer: nn.BatchNorm1d) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift that batch normalisation applies to each channel at inference."""
    variance, mean = cast("torch.Tensor", layer.running_var), cast("torch.Tensor", layer.running_mean)
    scale = layer.weight.double() / (variance.double() + layer.eps).sqrt()
    return scale, layer.bias.double() - mean.double() * scale


def feed_forward(
    g: GraphBuilder, x: ir.Value, layer: nn.Module, kind: Activation, name: str, scale: float = 1.0
) -> ir.Value:
    """A dense, gated or mixture-of-experts layer on [..., dim], times `scale`, which the last weights include."""
    with g.scope(name, group="feed_forward"):
        if isinstance(layer, MixtureOfExperts):
            return mixture_of_experts(g, x, layer, kind, scale)
        if isinstance(layer, GatedFeedForward):
            gate = activation(g, linear(g, x, layer.gate, "gate"), kind)
            return linear(g, g.op("Mul", gate, linear(g, x, layer.w_1, "w_1")), layer.w_2, "w_2", scale)
        dense = cast("DenseFeedForward", layer)
        return linear(g, activation(g, linear(g, x, dense.w_1, "w_1"), kind), dense.w_2, "w_2", scale)


def mixture_of_experts(
    g: GraphBuilder, x: ir.Value, layer: MixtureOfExperts, kind: Activation, scale: float
) -> ir.Value:
    """One call of a model-local function: the layer stays a single recognisable node with its weights as inputs."""
    experts = [cast("DenseFeedForward", expert) for expert in layer.experts]
    mixture = Mixture(
        num_experts=len(experts),
        top_k=layer.num_experts_per_token,
        activation=kind,
        bias=experts[0].w_1.bias is not None,
    )
    with g.scope(group="routers"):
        weights = [transposed(g, "gate.weight", layer.gate.weight)]
    with g.scope(group="experts"):
        for index, expert in enumerate(experts):
            for part, part_scale in (("w_1", 1.0), ("w_2", scale)):
                projection, name = getattr(expert, part), f"experts.{index}.{part}"
                weights.append(transposed(g, f"{name}.weight", projection.weight, part_scale))
                if mixture.bias:
                    weights.append(vector(g, f"{name}.bias", projection.bias, part_scale))
    function = define(g.functions, float_mixture(mixture))
    return g.op(function.name, x, *weights, domain=function.domain, **mixture.attributes())


def sinusoids(g: GraphBuilder, positions: ir.Value, dim: int) -> ir.Value:
    """Positional encodings [..., dim] of int64 positions [...], computed in the graph, so positions are unbounded."""
    with g.scope("positional_encoding"):
        frequencies = g.constant(inverse_frequencies(dim).numpy())
        angles = g.op("Mul", g.op("Unsqueeze", g.op("Cast", positions, to=ir.DataType.FLOAT), [-1]), frequencies)
        sine, cosine = g.op("Unsqueeze", g.op("Sin", angles), [-1]), g.op("Unsqueeze", g.op("Cos", angles), [-1])
        shape = g.op("Concat", g.op("Shape", positions), [dim], axis=0)
        return g.op("Reshape", g.op("Concat", sine, cosine, axis=-1), shape)


def mask_bias(g: GraphBuilder, visible: ir.Value) -> ir.Value:
    """The bias to add to scores: 0 where `visible` is true, `MASKED` elsewhere."""
    return g.op("Where", visible, 0.0, MASKED)


def position_biases(g: GraphBuilder, positions: ir.Value, layers: Sequence[MultiHeadAttention]) -> ir.Value:
    """The part of relative attention's scores that does not depend on the query: [batch, layers * heads, 1, keys].

    This is the last term of `AttentionNodes`, for all layers in one product with the sinusoids [batch, keys, dim].
    """

    def weight() -> torch.Tensor:
        return torch.cat([_position_bias(layer) for layer in layers]).T

    config = layers[0].config
    width = len(layers) * config.num_heads
    with g.scope("position_biases", group="positions"):
        biases = g.op("MatMul", positions, parameter(g, "weight", (layers[0].linear_pos.in_features, width), weight))
        return g.op("Unsqueeze", g.op("Transpose", biases, perm=[0, 2, 1]), [2])


def _position_bias(layer: MultiHeadAttention) -> torch.Tensor:
    """(v - u)^T W_pos / sqrt(head_dim) of each head [heads, dim].

    Summed up in this order everywhere: that of torch's products depends on the processor.
    """
    difference = (layer.pos_bias_v.double() - layer.pos_bias_u.double()) / math.sqrt(layer.config.head_dim)
    projection = layer.linear_pos.weight.double().reshape(*difference.shape, -1)
    total = torch.zeros_like(projection[:, 0])
    for place in range(layer.config.head_dim):
        total = total + difference[:, place, None] * projection[:, place]
    return total.float()


def _any_bias(*layers: nn.Linear) -> bool:
    return any(layer.bias is not None for layer in layers)


class AttentionNodes:
    """The parts of one attention layer, which encoder and decoder combine with their own caches and masks.

    The scores of WeNet's relative attention, ((q_i + u) k_j + (q_i + v) p_j) / s with p_j = W_pos pe_j, are computed as
    (q_i + u) / s (k_j + p_j) + (v - u) / s p_j: one product of queries and keys instead of two, plus a term that
    depends only on the position, see `position_biases`. u and the division are folded into the query projection.
    """

    def __init__(self, g: GraphBuilder, layer: MultiHeadAttention) -> None:
        self.g = g
        self.layer = layer
        self.config = layer.config
        self.heads = Heads(
            num_heads=layer.config.num_heads, num_kv_heads=layer.config.num_kv_heads, size=layer.config.head_dim
        )

    def query(self, x: ir.Value) -> ir.Value:
        """Queries [batch, heads, time, head_dim] of [batch, time, dim]."""
        g, layer, config = self.g, self.layer, self.config
        size = config.num_heads * config.head_dim
        scale = 1 / math.sqrt(config.head_dim)

        def bias() -> torch.Tensor:
            parts = [] if layer.linear_q.bias is None else [layer.linear_q.bias.float()]
            parts += [layer.pos_bias_u.float().flatten()] if config.relative else []
            return torch.stack(parts).sum(dim=0) * scale

        with g.scope("linear_q"):
            weight = parameter(
                g, "weight", (layer.linear_q.in_features, size), lambda: layer.linear_q.weight.float().T * scale
            )
            y = g.op("MatMul", x, weight)
            if config.relative or _any_bias(layer.linear_q):
                y = g.op("Add", y, parameter(g, "bias", (size,), bias))
            return to_heads(g, y, config.num_heads, config.head_dim)

    def key_value(self, x: ir.Value) -> ir.Value:
        """Keys and values [batch, kv_heads, time, 2*head_dim] of [batch, time, dim], as they are cached."""
        g, layer, config = self.g, self.layer, self.config
        width = 2 * config.num_kv_heads * config.head_dim

        def joined(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            heads = (config.num_kv_heads, config.head_dim)
            parts = [part.reshape(*heads, *part.shape[1:]) for part in (keys, values)]
            return torch.cat(parts, dim=1).flatten(0, 1)

        def bias() -> torch.Tensor:
            none = torch.zeros(width // 2)
            parts = [part.bias for part in (layer.linear_k, layer.linear_v)]
            return joined(*(none if part is None else part.float() for part in parts))

        with g.scope("linear_kv"):
            weight = parameter(
                g,
                "weight",
                (layer.linear_k.in_features, width),
                lambda: joined(layer.linear_k.weight, layer.linear_v.weight).T,
            )
            y = g.op("MatMul", x, weight)
            if _any_bias(layer.linear_k, layer.linear_v):
                y = g.op("Add", y, parameter(g, "bias", (width,), bias))
            return to_heads(g, y, config.num_kv_heads, 2 * config.head_dim)

    def attend(self, query: ir.Value, key_value: ir.Value, bias: ir.Value, positions: ir.Value | None) -> ir.Value:
        """Context [batch, time, dim] from queries, keys and values, score biases and the sinusoids of the keys."""
        g, heads = self.g, self.heads
        keys, values = heads.split(g, key_value)
        if self.config.relative and positions is not None:
            projected = linear(g, positions, self.layer.linear_pos, "linear_pos")
            keys = g.op("Add", keys, to_heads(g, projected, heads.num_heads, heads.size))
        return linear(g, context(g, query, (keys, values), bias, heads), self.layer.linear_out, "linear_out")
