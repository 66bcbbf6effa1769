"""The frames that blocks of one rate share, as nodes: their positions, which of them exist, and which are cached."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from u2moe.export.attention import MultiHeadAttention
from u2moe.export.attention_nodes import position_biases
from u2moe.export.layers import mask_bias, sinusoids
from u2moe.runtime.graph.attention import next_cache
from u2moe.runtime.graph.builder import GraphBuilder, Operand


class FrameNodes:
    """FrameNodes at positions `step` apart, and those in a cache before them.

    Args:
        g: builds the nodes.
        time: frames of this call [1]; `lens`: those of each row that exist [batch].
        offset: position of the first [batch], or [0] for whole utterances.
        step: encoder frames from one frame to the next.
        cache: keys and values of the frames before [blocks, batch, heads, cache, channels]; None: there are none.
        required: encoder frames to cache for the next call, negative: all; None for whole utterances.

    Attributes:
        positions: of the keys [batch, keys].
        visible: true for keys that exist [batch, keys].
        bias: added to scores [batch, 1, 1, keys].
        valid: 1 for frames that exist [batch, time, 1], where there is no cache.
    """

    def __init__(
        self,
        g: GraphBuilder,
        *,
        time: ir.Value,
        lens: ir.Value,
        offset: Operand,
        step: int = 1,
        cache: ir.Value | None = None,
        required: ir.Value | None = None,
    ) -> None:
        self.g = g
        self.cache = cache
        self.offset = offset
        self.step = step
        self.lens = lens
        self.cache_time: Operand = [0] if cache is None else g.op("Shape", cache, start=3, end=4)
        num_keys = time if cache is None else g.op("Add", self.cache_time, time)
        keys = g.op("Range", 0, g.op("Squeeze", num_keys, [0]), 1)
        past, length = self.cache_time, lens
        if step > 1:
            keys, length = g.op("Mul", keys, step), g.op("Mul", lens, step)
            past = past if cache is None else g.op("Mul", self.cache_time, step)
        self.positions = g.op("Add", g.op("Unsqueeze", g.op("Sub", offset, past), [1]), keys)
        visible = g.op("Less", self.positions, g.op("Unsqueeze", g.op("Add", offset, length), [1]))
        self.valid: ir.Value | None = None
        if cache is None:
            self.valid = g.op("Unsqueeze", g.op("Cast", visible, to=ir.DataType.FLOAT), [2])
        else:
            # positions before the start are padding of a cache that is not full yet
            visible = g.op("And", visible, g.op("GreaterOrEqual", self.positions, 0))
        self.visible = visible
        self.bias = mask_bias(g, g.op("Unsqueeze", visible, [1, 2]))
        if required is not None:
            kept = required if step == 1 else g.op("Div", required, step)
            surplus = g.op("Where", g.op("Less", required, 0), [0], g.op("Max", g.op("Sub", num_keys, kept), 0))
            self.first_kept_past = surplus
            self.first_kept_new = g.op("Max", g.op("Sub", surplus, self.cache_time), 0)

    def sinusoids(self, dim: int) -> ir.Value:
        """Positional encodings of the keys [batch, keys, dim]."""
        return sinusoids(self.g, self.positions, dim)

    def biases(self, layers: Sequence[MultiHeadAttention], encodings: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """The terms that each layer adds to its scores: `bias` and, if positions are relative, the position bias."""
        config = layers[0].config
        if not config.relative or not encodings:
            return [self.bias] * len(layers)
        biases = self.g.op("Add", position_biases(self.g, encodings[0], layers), self.bias)
        return self.g.ops("Split", biases, [config.num_heads] * len(layers), axis=1, num_outputs=len(layers))

    def history(self, cache: ir.Value, start: ir.Value) -> ir.Value:
        """The frames before a chunk [blocks, batch, past, channels], `start` in the place of those that do not exist.

        `cache` holds them as [blocks, batch, channels, past].
        """
        g = self.g
        length = g.op("Shape", cache, start=3, end=4)
        past = g.op("Range", g.op("Squeeze", g.op("Neg", length), [0]), 0, 1)
        past = past if self.step == 1 else g.op("Mul", past, self.step)
        index = g.op("Add", g.op("Unsqueeze", self.offset, [1]), past)
        exists = g.op("Unsqueeze", g.op("GreaterOrEqual", index, 0), [2])
        return g.op("Where", exists, g.op("Transpose", cache, perm=[0, 1, 3, 2]), start)

    def next_attention_cache(self, new: Sequence[ir.Value]) -> ir.Value:
        """Keys and values for the next call: from the past, and those of this call that the blocks keep."""
        if self.cache is None:
            raise ValueError("frames without a cache have no next one")
        return self.g.call(next_cache(len(new)), self.cache, self.first_kept_past, *new)[0]


def next_history(g: GraphBuilder, new: Sequence[ir.Value]) -> ir.Value:
    """The cache of frames before a convolution for the next call, as [blocks, batch, channels, past]."""
    return g.op("Transpose", g.op("Concat", *new, axis=0), perm=[0, 1, 3, 2])
