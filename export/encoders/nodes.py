"""The common part of all encoders as layers of a graph; a kind of encoder supplies its blocks."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from torch import nn

from u2moe.export.attention import MultiHeadAttention
from u2moe.export.attention_nodes import AttentionNodes
from u2moe.export.encoders.frames import FrameNodes, next_history
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, SpeechEncoder
from u2moe.export.layers import Residual, feed_forward, vector
from u2moe.export.positions import encoding_nodes
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, Operand


class EncoderNodes:
    """Builds the encoder. What all blocks share is computed once, at the top."""

    def __init__(self, g: GraphBuilder, encoder: SpeechEncoder, inputs: dict[str, ir.Value], max_position: int) -> None:
        self.g = g
        self.encoder = encoder
        self.max_position = max_position
        self.config = encoder.config
        self.inputs = inputs
        self.next_att: list[ir.Value] = []
        self.next_cnn: list[ir.Value] = []

    @property
    def streaming(self) -> bool:
        """Whether the graph has caches."""
        return "offset" in self.inputs

    @property
    def longest_history(self) -> int:
        """Frames after the subsampling that a convolution sees before its chunk, at most; whole ones of the output."""
        return 0

    def block(self, residual: Residual, block: nn.Module, index: int) -> None:
        """Add one block to the sum."""
        raise NotImplementedError

    @staticmethod
    def attention_of(block: nn.Module) -> MultiHeadAttention:
        """The attention of a block."""
        raise NotImplementedError

    def build(self) -> dict[str, ir.Value]:
        """All nodes; returns the outputs by name."""
        g = self.g
        with g.scope("encoder"):
            x = self._embed()
            self.output_lens = self.encoder.embed.output_lengths_nodes(g, self.inputs["chunk_lens"])
            self.share(x)
            x = self.run_blocks(x)
            outputs = {"output": x, "output_lens": self.output_lens}
            if self.streaming:
                with g.scope("caches"):
                    reduction = self.config.frame_reduction
                    first = self.offset if reduction == 1 else g.op("Div", self.offset, reduction)
                    outputs["next_offset"] = g.op("Add", first, self.output_lens)
                    outputs |= self.next_caches()
            return outputs

    def _embed(self) -> ir.Value:
        """Normalised and subsampled features [batch, time, dim]."""
        g, cmvn = self.g, self.encoder.global_cmvn
        x = self.inputs["chunk"]
        if cmvn is not None:
            with g.scope("global_cmvn", group="normalization"):
                x = g.op("Mul", g.op("Sub", x, vector(g, "mean", cmvn.mean)), vector(g, "istd", cmvn.istd))
        return self.embed(x)

    def embed(self, x: ir.Value) -> ir.Value:
        """Subsampled features [batch, time, dim] of normalised ones."""
        return self.encoder.embed.nodes(self.g, x, self.inputs["chunk_lens"])

    def share(self, x: ir.Value) -> None:
        """Positions and masks that every block uses."""
        g, cache = self.g, self.inputs.get(ATT_CACHE)
        with g.scope("frames"):
            time = g.op("Shape", x, start=1, end=2)
            self.offset: Operand = self._position(time) if self.streaming else [0]
            required = self.inputs.get("required_cache_size")
            self.frames = FrameNodes(
                g, time=time, lens=self.output_lens, offset=self.offset, cache=cache, required=required
            )
        learned = self.encoder.embed.learned
        if learned is None:
            self.positions = encoding_nodes(g, self.config, self.frames.positions)
        else:
            with g.scope("embed", self.encoder.embed.POSITIONS):
                self.positions = [learned.nodes(g, self.frames.positions)]
        layers = [self.attention_of(block) for block in self.encoder.encoders]
        self.biases = self.frames.biases(layers, self.positions)

    def _position(self, time: ir.Value) -> ir.Value:
        """The position of each row's chunk [batch]: `offset`, or as `next_offset` in `contract.encoder` says.

        In frames after the subsampling, as everything here.
        """
        g, offset, reduction = self.g, self.inputs["offset"], self.config.frame_reduction
        offset = offset if reduction == 1 else g.op("Mul", offset, reduction)
        limit = [self.max_position * reduction]
        cache_time = g.op("Shape", self.inputs[ATT_CACHE], start=3, end=4)
        base = g.op("Max", cache_time, [self.longest_history])
        # Equal chunks go from 0 to `first`, and from then on round from `base` to `base` + `length`.
        first = g.op("Mul", g.op("Div", limit, time), time)
        length = g.op("Max", g.op("Mul", g.op("Div", g.op("Sub", limit, base), time), time), [1])
        of_count = g.op("Add", base, g.op("Mod", g.op("Sub", offset, first), length))
        moved = g.op("Where", g.op("Greater", offset, limit), of_count, g.op("Min", offset, base))
        is_late = g.op("Greater", g.op("Add", offset, time), limit)
        is_limited = g.op("GreaterOrEqual", self.inputs["required_cache_size"], 0)
        return g.op("Where", g.op("And", is_late, is_limited), moved, offset)

    def run_blocks(self, x: ir.Value) -> ir.Value:
        """From subsampled features [batch, time, dim] to the encoder's output."""
        g = self.g
        if self.config.absolute_positions:
            x = g.op("Add", x, g.op("Slice", self.positions[0], self.frames.cache_time, [END], [1]))
        residual = Residual(g, x, pre_norm=self.config.pre_norm)
        for index, block in enumerate(self.encoder.encoders):
            with g.scope(f"encoders.{index}"):
                self.block(residual, block, index)
        if self.config.pre_norm and self.config.final_norm:
            residual.normalize(self.encoder.after_norm, "after_norm")
        return residual.total

    def next_caches(self) -> dict[str, ir.Value]:
        """The caches for the next call, by the names of their outputs."""
        caches = {f"r_{ATT_CACHE}": self.frames.next_attention_cache(self.next_att)}
        if self.next_cnn:
            caches[f"r_{CNN_CACHE}"] = next_history(self.g, self.next_cnn)
        return caches

    def feed_forward(self, layer: nn.Module, name: str, scale: float = 1.0) -> Callable[[ir.Value], ir.Value]:
        """A feed-forward layer, times `scale`."""
        return lambda x: feed_forward(self.g, x, layer, self.config.feed_forward.activation, name, scale)

    def self_attention(self, x: ir.Value, layer: MultiHeadAttention, index: int, name: str = "self_attn") -> ir.Value:
        """The attention of block `index`; what is to be cached of it is noted."""
        g = self.g
        with g.scope(name, group="attention"):
            nodes = AttentionNodes(g, layer)
            if not self.streaming:
                return nodes.attend(x, x, self.biases[index], self.positions)
            cache = [self.inputs[ATT_CACHE], g.constant(index), self.frames.first_kept_new]
            y, kept = nodes.attend_with_cache(x, cache, self.biases[index], self.positions)
            self.next_att.append(kept)
            return y
