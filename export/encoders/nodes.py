"""Graph layers that all encoders share. Each kind of encoder supplies its blocks."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import onnx_ir as ir
from torch import nn

from u2moe.export.attention import MultiHeadAttention
from u2moe.export.convolution import Surroundings
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, SpeechEncoder
from u2moe.export.layers import AttentionNodes, Residual, feed_forward, mask_bias, position_biases, vector
from u2moe.export.positions import encoding_nodes
from u2moe.runtime.graph.attention import END, next_cache
from u2moe.runtime.graph.builder import GraphBuilder, Operand


class FrameNodes:
    """The frames that all blocks of one frame rate share, and the cached frames before them.

    `time` [1] is the number of frames of this call, `lens` [batch] of valid frames in each row, and `offset` [batch]
    the position of the first frame ([0] for whole utterances). Frames are `step` subsampled frames apart. `cache` has
    the keys and values of earlier frames [blocks, batch, heads, cache, channels], if any. `required` is the number of
    subsampled frames to cache for the next call (negative: all); None for whole utterances.

    Attributes:
        positions: positions of the keys [batch, keys].
        visible: true for keys that exist [batch, keys].
        kept: this call's keys and values to cache, one entry for each block.
        bias: bias [batch, 1, 1, keys] to add to the scores.
        valid: 1 for frames that exist [batch, time, 1]; None if there is a cache.
    """

    def __init__(
        self,
        g: GraphBuilder,
        time: ir.Value,
        lens: ir.Value,
        offset: Operand,
        step: int = 1,
        cache: ir.Value | None = None,
        required: ir.Value | None = None,
    ) -> None:
        self.g, self.lens, self.offset, self.step, self.cache = g, lens, offset, step, cache
        self.kept: list[ir.Value] = []
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
        else:  # positions before the start are padding of a cache that is not full yet
            visible = g.op("And", visible, g.op("GreaterOrEqual", self.positions, 0))
        self.visible = visible
        self.bias = mask_bias(g, g.op("Unsqueeze", visible, [1, 2]))
        if required is not None:
            kept = required if step == 1 else g.op("Div", required, step)
            surplus = g.op("Where", g.op("Less", required, 0), [0], g.op("Max", g.op("Sub", num_keys, kept), 0))
            self.first_kept_past = surplus
            self.first_kept_new = g.op("Max", g.op("Sub", surplus, self.cache_time), 0)

    def biases(self, layers: Sequence[MultiHeadAttention], encodings: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Return each layer's score bias: `bias`, plus the position bias if positions are relative."""
        config = layers[0].config
        if not config.relative or not encodings:
            return [self.bias] * len(layers)
        biases = self.g.op("Add", position_biases(self.g, encodings[0], layers), self.bias)
        return self.g.ops("Split", biases, [config.num_heads] * len(layers), axis=1, num_outputs=len(layers))

    def surroundings(self, initial: ir.Value | None, cache: ir.Value | None) -> Surroundings:
        """Return the frames around convolutions, which see `initial` [blocks, 1, 1, channels] before the first frame.

        `cache` [blocks, batch, channels, past] contains the frames before a chunk; None for whole utterances.
        """
        g = self.g
        if initial is not None and cache is not None:
            past = g.op("Range", g.op("Squeeze", g.op("Neg", g.op("Shape", cache, start=3, end=4)), [0]), 0, 1)
            past = past if self.step == 1 else g.op("Mul", past, self.step)
            index = g.op("Add", g.op("Unsqueeze", self.offset, [1]), past)
            exists = g.op("Unsqueeze", g.op("GreaterOrEqual", index, 0), [2])
            initial = g.op("Where", exists, g.op("Transpose", cache, perm=[0, 1, 3, 2]), initial)
        return Surroundings(initial, self.valid)

    def attend(
        self, nodes: AttentionNodes, x: ir.Value, bias: ir.Value, positions: Sequence[ir.Value], row: int
    ) -> ir.Value:
        """Apply self-attention to `x` [batch, time, dim]; `row` is the block's row in the cache, if any."""
        cached = [] if self.cache is None else [self.cache, self.g.constant(row), self.first_kept_new]
        y, *kept = nodes.attend(x, x, bias, positions, cached)
        self.kept += kept
        return y

    def next_attention_cache(self) -> ir.Value:
        """Return the next call's cache: past keys and values, followed by the new ones in `kept`."""
        past = cast("ir.Value", self.cache)
        return self.g.call(next_cache(len(self.kept)), past, self.first_kept_past, *self.kept)[0]


def next_history(g: GraphBuilder, new: Sequence[ir.Value]) -> ir.Value:
    """Return the next call's cache of convolution histories, as [blocks, batch, channels, past]."""
    return g.op("Transpose", g.op("Concat", *new, axis=0), perm=[0, 1, 3, 2])


class EncoderNodes:
    """Builds the encoder. Values that all blocks share are computed once."""

    ATTENTION: ClassVar[str] = "self_attn"  # WeNet's name for a block's attention
    own: Any  # settings that only this kind of encoder has
    seen: Surroundings  # the frames around the convolutions with the cache `CNN_CACHE`

    def __init__(self, g: GraphBuilder, encoder: SpeechEncoder, inputs: dict[str, ir.Value], max_position: int) -> None:
        self.g, self.inputs, self.max_position = g, inputs, max_position
        self.encoder, self.config, self.own = encoder, encoder.config, encoder.config.own
        self.streaming = "offset" in inputs

    @property
    def _longest_history(self) -> int:
        """The largest number of subsampled frames that a convolution sees before a chunk, as whole output frames."""
        return max((kernel - 1 for _, _, kernel in self.encoder.block.convolutions(self.config)), default=0)

    def _block(self, residual: Residual, block: nn.Module, index: int) -> None:
        """Build one block, whose layers read the residual and add to it."""
        raise NotImplementedError

    def attention_of(self, block: nn.Module) -> MultiHeadAttention:
        """Return the attention of a block."""
        return cast("MultiHeadAttention", getattr(block, self.ATTENTION))

    def around(self, initial: ir.Value | None, cache: str = CNN_CACHE) -> Surroundings:
        """Return the `Surroundings` of this call's frames. Convolutions see `initial` before the first frame."""
        with self.g.scope("frames"):
            return self.frames.surroundings(initial, self.inputs.get(cache))

    def build(self) -> dict[str, ir.Value]:
        """Build all nodes and return the outputs by name."""
        g = self.g
        with g.scope("encoder"):
            x, lens, cmvn = self.inputs["chunk"], self.inputs["chunk_lens"], self.encoder.global_cmvn
            if cmvn is not None:
                with g.scope("global_cmvn", group="normalization"):
                    x = g.op("Mul", g.op("Sub", x, vector(g, "mean", cmvn.mean)), vector(g, "istd", cmvn.istd))
            x = self.encoder.embed.nodes(g, x, lens)
            self.output_lens = self.encoder.embed.output_lengths_nodes(g, lens)
            self._share(x)
            x = self._run_blocks(x)
            outputs = {"output": x, "output_lens": self.output_lens}
            if self.streaming:
                with g.scope("caches"):
                    reduction = self.config.frame_reduction
                    first = self.offset if reduction == 1 else g.op("Div", self.offset, reduction)
                    outputs["next_offset"] = g.op("Add", first, self.output_lens)
                    outputs |= self._next_caches()
            return outputs

    def _share(self, x: ir.Value) -> None:
        """Build the positions and masks that every block uses, for subsampled features [batch, time, dim]."""
        g, cache, required = self.g, self.inputs.get(ATT_CACHE), self.inputs.get("required_cache_size")
        with g.scope("frames"):
            time = g.op("Shape", x, start=1, end=2)
            self.offset: Operand = self._position(time) if self.streaming else [0]
            self.frames = FrameNodes(g, time, self.output_lens, self.offset, cache=cache, required=required)
        learned = self.encoder.embed.learned
        if learned is None:
            self.positions = encoding_nodes(g, self.config, self.frames.positions)
        else:
            with g.scope("embed", self.encoder.embed.POSITIONS):
                self.positions = [learned.nodes(g, self.frames.positions)]
        self.biases = self.frames.biases(list(map(self.attention_of, self.encoder.encoders)), self.positions)

    def _position(self, time: ir.Value) -> ir.Value:
        """Return each row's position [batch] in subsampled frames: `offset`, limited as in `contract.encoder`."""
        g, offset, reduction = self.g, self.inputs["offset"], self.config.frame_reduction
        offset = offset if reduction == 1 else g.op("Mul", offset, reduction)
        limit = [self.max_position * reduction]
        base = g.op("Max", g.op("Shape", self.inputs[ATT_CACHE], start=3, end=4), [self._longest_history])
        # With chunks of equal size, positions run from 0 to `first`, then cycle from `base` to `base` + `length`.
        first = g.op("Mul", g.op("Div", limit, time), time)
        length = g.op("Max", g.op("Mul", g.op("Div", g.op("Sub", limit, base), time), time), [1])
        of_count = g.op("Add", base, g.op("Mod", g.op("Sub", offset, first), length))
        moved = g.op("Where", g.op("Greater", offset, limit), of_count, g.op("Min", offset, base))
        is_late = g.op("Greater", g.op("Add", offset, time), limit)
        is_limited = g.op("GreaterOrEqual", self.inputs["required_cache_size"], 0)
        return g.op("Where", g.op("And", is_late, is_limited), moved, offset)

    def _run_blocks(self, x: ir.Value) -> ir.Value:
        """Run the blocks on subsampled features [batch, time, dim] and return the encoder's output."""
        g = self.g
        if self.config.absolute_positions:
            x = g.op("Add", x, g.op("Slice", self.positions[0], self.frames.cache_time, [END], [1]))
        residual = Residual(g, x, pre_norm=self.config.pre_norm)
        for index, block in enumerate(self.encoder.encoders):
            with g.scope(f"encoders.{index}"):
                self._block(residual, block, index)
        if self.config.pre_norm and self.config.final_norm:
            residual.normalize(self.encoder.after_norm, "after_norm")
        return residual.total

    def _next_caches(self) -> dict[str, ir.Value]:
        """Return the caches for the next call, by the names of their outputs."""
        caches, kept = {f"r_{ATT_CACHE}": self.frames.next_attention_cache()}, self.seen.kept
        return caches | ({f"r_{CNN_CACHE}": next_history(self.g, kept)} if kept else {})

    def feed_forward(self, layer: nn.Module, name: str, scale: float = 1.0) -> Callable[[ir.Value], ir.Value]:
        """Return a function that applies a feed-forward layer and multiplies its output by `scale`."""
        return lambda x: feed_forward(self.g, x, layer, self.config.feed_forward.activation, name, scale)

    def _self_attention(self, x: ir.Value, block: nn.Module, index: int) -> ir.Value:
        """Apply the attention of block `index` to `x` [batch, time, dim], and record the frames that must be cached."""
        with self.g.scope(self.ATTENTION, group="attention"):
            nodes = AttentionNodes(self.g, self.attention_of(block))
            return self.frames.attend(nodes, x, self.biases[index], self.positions, index)
