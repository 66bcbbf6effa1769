"""Attention layers as calls of ONNX functions. WeNet's position biases are folded into weights."""

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch

from u2moe.export.attention import MultiHeadAttention
from u2moe.export.layers import Values, linear, parameter, product, transposed, vector
from u2moe.runtime.graph.attention import Heads, PositionUse, attention, cached_attention
from u2moe.runtime.graph.builder import GraphBuilder


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
            heads = (config.num_kv_heads, config.head_dim)
            parts = [part.reshape(*heads, *part.shape[1:]) for part in (keys, values)]
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
    """Return the query-independent part of relative attention's scores: [batch, layers * heads, 1, keys].

    This is the last term of the sum in `AttentionNodes`. One product with the sinusoids [batch, keys, dim] yields it
    for all layers.
    """
    shape = (layers[0].linear_pos.in_features, len(layers) * layers[0].config.num_heads)
    with g.scope("position_biases", group="positions"):
        weight = parameter(g, "weight", shape, lambda: torch.cat(list(map(_position_bias, layers))).T)
        biases = product(g, positions, weight)
        return g.op("Unsqueeze", g.op("Transpose", biases, perm=[0, 2, 1]), [2])


def _position_bias(layer: MultiHeadAttention) -> torch.Tensor:
    """Return (v - u)^T W_pos / sqrt(head_dim) of each head [heads, dim]."""
    # in a fixed order of summation, because the order in torch's products depends on the processor
    difference = (layer.pos_bias_v.double() - layer.pos_bias_u.double()) / math.sqrt(layer.config.head_dim)
    projection = layer.linear_pos.weight.double().reshape(*difference.shape, -1)
    total = torch.zeros_like(projection[:, 0])
    for index in range(layer.config.head_dim):
        total = total + difference[:, index, None] * projection[:, index]
    return total.float()
