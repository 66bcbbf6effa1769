"""Attention between projections as ONNX nodes, and with a cache of keys and values as a model-local function."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import onnx_ir as ir

from u2moe.runtime.graph.builder import GraphBuilder, build_function

END = 2**63 - 1
"""As the end of a slice: everything to the end of the axis."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of an attention layer.

    Attributes:
        num_heads: heads of queries; `num_kv_heads`: of keys and values, each for a group of the former.
        size: channels of a head.
    """

    num_heads: int
    num_kv_heads: int
    size: int

    def split(self, g: GraphBuilder, key_value: ir.Value) -> tuple[ir.Value, ...]:
        """Keys and values [batch, num_heads, keys, size] of both [batch, num_kv_heads, keys, 2 * size]."""
        if self.num_heads > self.num_kv_heads:
            key_value = self._repeat(g, key_value)
        return g.ops("Split", key_value, [self.size] * 2, axis=-1, num_outputs=2)

    def _repeat(self, g: GraphBuilder, key_value: ir.Value) -> ir.Value:
        """Repeat each key/value head for the heads of its group: [batch, kv_heads, t, e] to [batch, heads, t, e]."""
        shape = g.op("Shape", key_value)
        batch, rest = g.op("Slice", shape, [0], [1]), g.op("Slice", shape, [2], [4])
        wide = g.op("Concat", batch, [self.num_kv_heads, self.num_heads // self.num_kv_heads], rest, axis=0)
        expanded = g.op("Expand", g.op("Unsqueeze", key_value, [2]), wide)
        return g.op("Reshape", expanded, g.op("Concat", batch, [self.num_heads], rest, axis=0))


def to_heads(g: GraphBuilder, x: ir.Value, num_heads: int, size: int) -> ir.Value:
    """[batch, time, heads * size] to [batch, heads, time, size]."""
    return g.op("Transpose", g.op("Reshape", x, [0, 0, num_heads, size]), perm=[0, 2, 1, 3])


def context(
    g: GraphBuilder, query: ir.Value, keys_values: tuple[ir.Value, ir.Value], bias: ir.Value, heads: Heads
) -> ir.Value:
    """Context [batch, time, heads * size] of queries [batch, heads, time, size]; `bias` is added to the scores."""
    keys, values = keys_values
    scores = g.op("MatMul", query, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    weights = g.op("Softmax", g.op("Add", scores, bias), axis=-1)
    joined = g.op("Transpose", g.op("MatMul", weights, values), perm=[0, 2, 1, 3])
    return g.op("Reshape", joined, [0, 0, heads.num_heads * heads.size])


def cached_attention(heads: Heads, *, relative: bool) -> tuple[ir.Function, dict[str, int]]:
    """Attention of a chunk to a cache and to itself, and the attributes of its calls.

    Inputs: `query` [batch, time, heads * size], `key_value` [batch, time, kv_heads * 2 * size], `cache` [blocks, batch,
    kv_heads, past, 2 * size], `block` (), `first_kept` [1], `bias` [batch, heads, time, past + time], where each of the
    first three axes may be 1, and if `relative` `positions` [batch or 1, past + time, heads * size], added to the keys.
    Outputs: `context` [batch, time, heads * size]; `kept` [1, batch, kv_heads, kept, 2 * size], keys and values of this
    chunk from frame `first_kept` on, as they are cached.
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
        query, key_value, cache, block, first_kept, bias, *positions = inputs
        own = to_heads(g, key_value, heads.num_kv_heads, 2 * heads.size)
        kept = g.op("Unsqueeze", g.op("Slice", own, first_kept, [END], [2]), [0])
        both = g.op("Concat", g.op("Gather", cache, block, axis=0), own, axis=2)
        keys, values = heads.split(g, both)
        if positions:
            keys = g.op("Add", keys, to_heads(g, positions[0], heads.num_heads, heads.size))
        queries = to_heads(g, query, heads.num_heads, heads.size)
        return [context(g, queries, (keys, values), bias, heads), kept]

    names = ["query", "key_value", "cache", "block", "first_kept", "bias", *(["positions"] if relative else [])]
    attributes = {**asdict(heads), "relative": int(relative)}
    return build_function("CachedAttention", names, body, attributes), attributes
