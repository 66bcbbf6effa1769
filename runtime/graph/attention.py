"""Model-local functions for attention, excluding its projections. Some use a cache of keys and values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from u2moe.runtime.graph.builder import Body, GraphBuilder, build_function

END = 2**63 - 1  # end of a slice that extends to the end of the axis
_LANES = 16  # maximum number of values that onnxruntime adds at once, one in each lane of a vector
_BLOCK = 16_384
"""Size of the blocks in which onnxruntime sums over keys: the number of keys times the number of channels of a head.
The number of channels is rounded up to a power of two, at least 16."""

PositionUse = Literal["", "relative", "rotary", "distance"]
"""How scores depend on positions. "": not at all. "relative": encodings added to the keys. "rotary": rotation of
queries and keys. "distance": learned vectors for the distance from query to key."""
POSITION_INPUTS: dict[PositionUse, tuple[str, ...]] = {
    "": (),
    "relative": ("positions",),  # [batch or 1, keys, num_heads * size]
    "rotary": ("cosines", "sines"),  # of the keys' angles [batch or 1, keys, size / 2]
    "distance": ("vectors",),  # [FURTHEST_LEFT + FURTHEST_RIGHT + 1, size]
}
FURTHEST_LEFT, FURTHEST_RIGHT = 64, 8
"""Largest distances that have their own vectors, to the left and to the right, as in WeNet. Keys further away use the
vector of the largest distance on their side."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of an attention layer: query heads, and key/value heads, each shared by a group of query heads."""

    num_heads: int
    num_kv_heads: int
    size: int  # channels per head

    def context(
        self,
        g: GraphBuilder,
        query: ir.Value,
        key_value: ir.Value,
        bias: ir.Value,
        use: PositionUse,
        positions: Sequence[ir.Value],
        *,
        cache: ir.Value | None = None,
    ) -> ir.Value:
        """Add nodes for the context [batch, time, num_heads * size].

        `query` is [batch, time, num_heads * size], and `key_value` [batch, num_kv_heads, keys, 2 * size]. `bias` is
        added to the scores. `positions` are the inputs named in `POSITION_INPUTS[use]`. The first keys and values come
        from `cache`, if given. It may begin with padding.
        """
        if self.num_heads > self.num_kv_heads:
            key_value = self.repeated(g, key_value)
        keys, values = g.ops("Split", key_value, [self.size] * 2, axis=-1, num_outputs=2)
        if use == "relative":
            keys = g.op("Add", keys, to_heads(g, positions[0], self.num_heads, self.size))
        if use == "rotary":
            keys = self._rotated(g, keys, positions)
        if cache is not None:
            before = self._alignment(g, cache, bias)
            # Pad all axes: onnxruntime's optimizer moves transpositions past a Pad and ignores its input `axes`.
            of_keys = g.op("Concat", [0, 0], before, [0] * 5, axis=0)
            keys, values = (g.op("Pad", each, of_keys, 0.0) for each in (keys, values))
            bias = g.op("Pad", bias, g.op("Concat", [0] * 3, before, [0] * 4, axis=0), -np.inf)
        queries = to_heads(g, query, self.num_heads, self.size)
        if use == "rotary":
            start = g.op("Neg", g.op("Shape", query, start=1, end=2))
            queries = self._rotated(g, queries, [g.op("Slice", each, start, [END], [1]) for each in positions])
        scores = g.op("MatMul", queries, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
        if use == "distance":
            scores = g.op("Add", scores, self.scores_of_distances(g, queries, keys, positions[0]))
        weights = g.op("Softmax", g.op("Add", scores, bias), axis=-1)
        return self.joined(g, g.op("MatMul", weights, values))

    def joined(self, g: GraphBuilder, context: ir.Value) -> ir.Value:
        """Reshape [batch, heads, time, size] to [batch, time, heads * size]."""
        return g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), [0, 0, self.num_heads * self.size])

    def _alignment(self, g: GraphBuilder, cache: ir.Value, bias: ir.Value) -> ir.Value:
        """Return how many frames [1] to insert before the keys, so that padding in the cache does not affect results.

        The last bits of a float32 sum depend on how its terms fall into the processor's vectors and onnxruntime's
        blocks. Therefore, the chunk always begins at a vector boundary. If the keys exceed one block, the chunk ends at
        a block boundary. With an empty cache, no frames are inserted. The result is the same for all layers of a graph,
        so onnxruntime computes it once.
        """
        block = _BLOCK // max(16, 1 << (self.size - 1).bit_length())
        past, keys = g.op("Shape", cache, start=3, end=4), g.op("Shape", bias, start=3, end=4)
        end = g.op("Add", keys, g.op("Mod", g.op("Sub", past, keys), [_LANES]))
        is_one_block = g.op("LessOrEqual", g.op("Mul", end, g.op("Min", past, [1])), [block])
        step = g.op("Where", is_one_block, [_LANES], [block])
        return g.op("Mod", g.op("Neg", end), step)

    def _rotated(self, g: GraphBuilder, x: ir.Value, angles: Sequence[ir.Value]) -> ir.Value:
        """Rotate x [batch, heads, time, size]: each channel of the first half with its counterpart in the second."""
        first, second = g.ops("Split", x, [self.size // 2] * 2, axis=-1, num_outputs=2)
        cosines, sines = (g.op("Unsqueeze", each, [1]) for each in angles)
        upper = g.op("Sub", g.op("Mul", first, cosines), g.op("Mul", second, sines))
        lower = g.op("Add", g.op("Mul", first, sines), g.op("Mul", second, cosines))
        return g.op("Concat", upper, lower, axis=-1)

    def scores_of_distances(self, g: GraphBuilder, queries: ir.Value, keys: ir.Value, vectors: ir.Value) -> ir.Value:
        """Return the product of each query and the vector for its distance to each key: [batch, heads, time, keys]."""
        products = g.op("MatMul", queries, g.op("Transpose", vectors, perm=[1, 0]))
        time, num_keys = g.op("Shape", queries, start=2, end=3), g.op("Shape", keys, start=2, end=3)
        places = g.op("Range", 0, g.op("Squeeze", num_keys, [0]), 1)
        own = g.op("Unsqueeze", g.op("Slice", places, g.op("Sub", num_keys, time), [END], [0]), [1])
        further = g.op("Max", g.op("Min", g.op("Sub", places, own), FURTHEST_RIGHT), -FURTHEST_LEFT)
        index = g.op("Add", further, FURTHEST_LEFT)
        shape = g.op("Concat", g.op("Shape", queries, end=3), num_keys, axis=0)
        return g.op("GatherElements", products, g.op("Expand", index, shape), axis=3)

    def repeated(self, g: GraphBuilder, key_value: ir.Value) -> ir.Value:
        """Repeat each key/value head for its group of query heads: [batch, kv_heads, t, e] to [batch, heads, t, e]."""
        shape = g.op("Shape", key_value)
        batch, rest = g.op("Slice", shape, [0], [1]), g.op("Slice", shape, [2], [4])
        wide = g.op("Concat", batch, [self.num_kv_heads, self.num_heads // self.num_kv_heads], rest, axis=0)
        expanded = g.op("Expand", g.op("Unsqueeze", key_value, [2]), wide)
        return g.op("Reshape", expanded, g.op("Concat", batch, [self.num_heads], rest, axis=0))


def to_heads(g: GraphBuilder, x: ir.Value, num_heads: int, size: int) -> ir.Value:
    """Reshape [batch, time, heads * size] to [batch, heads, time, size]."""
    return g.op("Transpose", g.op("Reshape", x, [0, 0, num_heads, size]), perm=[0, 2, 1, 3])


def attention(heads: Heads, use: PositionUse = "") -> ir.Function:
    """Build the function that computes attention without a cache: `context` [batch, time, heads * size].

    Inputs: `query` [batch, time, heads * size]; `key_value` [batch, keys, kv_heads * 2 * size]; `bias` [batch, heads,
    time, keys], whose first three axes may be 1; and the inputs named in `POSITION_INPUTS[use]`.
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        query, key_value, bias, *positions = inputs
        both = to_heads(g, key_value, heads.num_kv_heads, 2 * heads.size)
        return heads.context(g, query, both, bias, use, positions)

    return _built("Attention", heads, use, ["query", "key_value", "bias"], body)


def _built(name: str, heads: Heads, use: PositionUse, inputs: list[str], body: Body) -> ir.Function:
    """Build a function. Relative and plain attention share a name, because they differ only in the keys."""
    is_own = use in ("rotary", "distance")
    attributes = {**asdict(heads), **({} if is_own else {"relative": int(use == "relative")})}
    name = f"{use.capitalize()}{name}" if is_own else name
    return build_function(name, [*inputs, *POSITION_INPUTS[use]], body, attributes)


def cached_attention(heads: Heads, use: PositionUse = "") -> ir.Function:
    """Build the function with which a chunk attends to a cache and to itself.

    Its inputs are those of `attention`, for past + time keys, and after `key_value`: `cache` [blocks, batch, kv_heads,
    past, 2 * size], `block`, the index of the block (), and `first_kept`, the index of the chunk's first frame that is
    cached [1]. Outputs: `context` [batch, time, heads * size], and `kept` [1, batch, kv_heads, kept, 2 * size]: the
    keys and values of this chunk from `first_kept` on, for the cache.
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
        query, key_value, cache, block, first_kept, bias, *positions = inputs
        own = to_heads(g, key_value, heads.num_kv_heads, 2 * heads.size)
        kept = g.op("Unsqueeze", g.op("Slice", own, first_kept, [END], [2]), [0])
        both = g.op("Concat", g.op("Gather", cache, block, axis=0), own, axis=2)
        return [heads.context(g, query, both, bias, use, positions, cache=cache), kept]

    inputs = ["query", "key_value", "cache", "block", "first_kept", "bias"]
    return _built("CachedAttention", heads, use, inputs, body)


def next_cache(num_blocks: int) -> ir.Function:
    """Build the function that joins the old cache and the new frames of `num_blocks` layers into the next cache.

    Inputs: `cache` [num_blocks, batch, kv_heads, past, 2 * size]; `first`, the index of the first cached frame to keep
    [1]; and for each layer N `kept.N`, the output `kept` of `cached_attention`. The output is shaped like `cache`.
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        cache, first, *kept = inputs
        return g.op("Concat", g.op("Slice", cache, first, [END], [3]), g.op("Concat", *kept, axis=0), axis=3)

    return build_function("NextCache", ["cache", "first", *(f"kept.{index}" for index in range(num_blocks))], body)


def shifted_attention(heads: Heads) -> ir.Function:
    """Build attention with position scores shifted as in Transformer-XL (arXiv 1901.02860), for whole utterances.

    Its inputs are those of `attention`, but with as many keys as queries and one head for each key/value head;
    `positions` [1, time, heads * size]; `content_bias` and `position_bias` [heads * size], added to the queries that
    are multiplied by the keys and by the positions; and `places` [batch, time * time], see `shifted_places`.
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        query, key_value, bias, positions, content_bias, position_bias, places = inputs
        both = to_heads(g, key_value, heads.num_kv_heads, 2 * heads.size)
        keys, values = g.ops("Split", both, [heads.size] * 2, axis=-1, num_outputs=2)
        by_content = to_heads(g, g.op("Add", query, content_bias), heads.num_heads, heads.size)
        by_position = to_heads(g, g.op("Add", query, position_bias), heads.num_heads, heads.size)
        located = g.op("Transpose", to_heads(g, positions, heads.num_heads, heads.size), perm=[0, 1, 3, 2])
        scores = g.op("MatMul", by_position, located)
        shape = g.op("Shape", scores)
        # With a zero before each row, the flattened matrix contains the scores of the shifted matrix in order.
        flat = g.op("Reshape", g.op("Pad", scores, [0, 0, 0, 1, 0, 0, 0, 0]), [0, heads.num_heads, -1])
        index = g.op("Concat", g.op("Slice", shape, [0], [2]), g.op("Shape", places, start=1, end=2), axis=0)
        shifted = g.op("GatherElements", flat, g.op("Expand", g.op("Unsqueeze", places, [1]), index), axis=2)
        content = g.op("MatMul", by_content, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
        total = g.op("Add", g.op("Add", content, g.op("Reshape", shifted, shape)), bias)
        return heads.joined(g, g.op("MatMul", g.op("Softmax", total, axis=-1), values))

    names = ["query", "key_value", "bias", "positions", "content_bias", "position_bias", "places"]
    return build_function("ShiftedAttention", names, body, asdict(heads))


def shifted_places(g: GraphBuilder, time: ir.Value, lens: ir.Value) -> ir.Value:
    """For each element of a shifted matrix [time, time], return its index in the flattened original matrix.

    The inputs are `time` [1] and `lens` [batch]; the indices are [batch, time * time]. The original matrix starts with
    an additional column of zeros. Each matrix is shifted by the length of its utterance, so padding does not matter.
    """
    frames = g.op("Range", 0, g.op("Squeeze", time, [0]), 1)
    length = g.op("Unsqueeze", lens, [1, 2])
    flat = g.op("Add", g.op("Add", g.op("Mul", g.op("Unsqueeze", frames, [1]), length), frames), length)
    width = g.op("Add", length, 1)
    row, column = g.op("Div", flat, width), g.op("Mod", flat, width)
    found = g.op("Add", g.op("Mul", row, g.op("Add", time, 1)), column)
    last = g.op("Sub", g.op("Mul", time, g.op("Add", time, 1)), 1)  # padding may have any index
    return g.op("Reshape", g.op("Min", found, last), [0, -1])
