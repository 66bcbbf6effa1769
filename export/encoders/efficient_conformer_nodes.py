"""The Efficient Conformer encoder as layers of a graph, for full context."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import onnx_ir as ir
import torch
from torch import nn

from u2moe.export.attention import MultiHeadAttention
from u2moe.export.attention_nodes import AttentionNodes
from u2moe.export.convolution import (
    ConvolutionFrames,
    ConvolutionModule,
    convolution,
    convolution_parts,
    initial_cache,
)
from u2moe.export.encoders.efficient_conformer import EfficientBlock, GroupedAttention, Strided
from u2moe.export.encoders.frames import FrameNodes
from u2moe.export.encoders.nodes import EncoderNodes
from u2moe.export.layers import Residual, linear, parameter, product
from u2moe.runtime.graph.attention import Heads, attention
from u2moe.runtime.graph.convolution import ReducingConvolution


class EfficientConformerNodes(EncoderNodes):
    """Builds the encoder."""

    @property
    def own(self) -> Strided:
        """What only this encoder has."""
        return cast("Strided", self.config.own)

    @staticmethod
    def attention_of(block: nn.Module) -> MultiHeadAttention:
        """See `EncoderNodes`."""
        return cast("EfficientBlock", block).self_attn

    def share(self, x: ir.Value) -> None:
        """See `EncoderNodes`."""
        modules = [cast("ConvolutionModule", block.conv_module) for block in self.encoder.encoders]
        self.start = initial_cache(self.g, modules)
        self._enter(self.g.op("Shape", x, start=1, end=2), 1)

    def _enter(self, time: ir.Value, step: int) -> None:
        """Begin with the frames of one rate."""
        g = self.g
        self.time, self.step = time, step
        with g.scope(f"frames_{step}"):
            self.frames = FrameNodes(g, time=time, lens=self.output_lens, offset=[0], step=step)
            self.encodings = self.frames.sinusoids(self.config.dim)
        self.around = ConvolutionFrames(histories=self.start, valid=self.frames.valid, streaming=False)

    def run_blocks(self, x: ir.Value) -> ir.Value:
        """See `EncoderNodes`."""
        residual = Residual(self.g, x, pre_norm=self.config.pre_norm)
        for index, block in enumerate(self.encoder.encoders):
            with self.g.scope(f"encoders.{index}"):
                residual = self._block(residual, cast("EfficientBlock", block), index)
        if self.config.pre_norm:
            residual.normalize(self.encoder.after_norm, "after_norm")
        return residual.total

    def _block(self, residual: Residual, block: EfficientBlock, index: int) -> Residual:
        if block.feed_forward_macaron is not None:
            layer = self.feed_forward(block.feed_forward_macaron, "feed_forward_macaron", block.scale)
            residual.add(layer, block.norm_ff_macaron, "norm_ff_macaron")
        residual.add(lambda x: self._attended(x, block.self_attn), block.norm_mha, "norm_mha")
        module = cast("ConvolutionModule", block.conv_module)
        if block.stride == 1:
            residual.add(lambda x: convolution(self.g, x, module, self.around, index)[0], block.norm_conv, "norm_conv")
        else:
            residual = self._strided(residual, block, index)
        residual.add(self.feed_forward(block.feed_forward, "feed_forward", block.scale), block.norm_ff, "norm_ff")
        residual.normalize(block.norm_final, "norm_final")
        return residual

    def _strided(self, residual: Residual, block: EfficientBlock, index: int) -> Residual:
        """The convolution with a stride, and what stands on the other side of the sum: averages of frames."""
        g, stride, module = self.g, block.stride, cast("ConvolutionModule", block.conv_module)
        pre_norm = self.config.pre_norm
        branch = residual.normalized(block.norm_conv, "norm_conv") if pre_norm else residual.total
        branch = self._reduced(branch, module, stride, index)
        average = self._averaged(residual.total, stride)
        self.output_lens = g.op("Div", g.op("Add", self.output_lens, stride - 1), stride)
        self._enter(g.op("Div", g.op("Add", self.time, stride - 1), stride), self.step * stride)
        following = Residual(g, average, pre_norm=pre_norm)
        following.add_branch(branch)
        if not pre_norm:
            following.normalize(block.norm_conv, "norm_conv")
        return following

    def _reduced(self, x: ir.Value, module: ConvolutionModule, stride: int, index: int) -> ir.Value:
        g, config = self.g, module.config
        valid: ir.Value | None = self.frames.valid
        padding = (config.kernel - 1) // 2
        form = ReducingConvolution(kernel=config.kernel, stride=stride, before=padding, after=padding)
        parts = convolution_parts(g, x, module)
        seen = parts.gated
        if config.causal:
            form, valid = replace(form, before=0, after=0), g.constant(torch.ones(1, 1, 1).numpy())
            if self.start is not None:
                start = g.op("Gather", self.start, g.constant(index), axis=0)
                shape = g.op(
                    "Concat", g.op("Shape", seen, start=0, end=1), [config.kernel - 1, config.channels], axis=0
                )
                seen = g.op("Concat", g.op("Expand", start, shape), seen, axis=1)
        (y,) = g.call(form.function(config.channels), seen, cast("ir.Value", valid), *parts.taps)
        return parts.finish(y)

    def _averaged(self, x: ir.Value, stride: int) -> ir.Value:
        """The average of each `stride` frames, of those that exist [batch, ceil(time / stride), dim]."""
        g, valid = self.g, cast("ir.Value", self.frames.valid)

        def total(values: ir.Value, width: int) -> ir.Value:
            padded = self._padded(values, stride)
            return g.op("ReduceSum", g.op("Reshape", padded, [0, -1, stride, width]), [2], keepdims=0)

        number = g.op("Max", total(valid, 1), 1.0)
        return g.op("Div", total(g.op("Mul", x, valid), self.config.dim), number)

    def _padded(self, x: ir.Value, size: int) -> ir.Value:
        """[batch, time, ...] with zeros at the end, so that `size` divides the time."""
        g = self.g
        missing = g.op("Mod", g.op("Sub", [0], self.time), [size])
        return g.op("Pad", x, g.op("Concat", [0, 0, 0, 0], missing, [0], axis=0))

    def _attended(self, x: ir.Value, layer: MultiHeadAttention) -> ir.Value:
        g = self.g
        with g.scope("self_attn", group="attention"):
            if isinstance(layer, GroupedAttention):
                return self._grouped(x, layer)
            (bias,) = self.frames.biases([layer], [self.encodings])
            return AttentionNodes(g, layer).attend(x, x, bias, [self.encodings])

    def _grouped(self, x: ir.Value, layer: GroupedAttention) -> ir.Value:
        """Attention between groups of frames: frames side by side are one vector, and heads are cut out of that."""
        g, size = self.g, layer.group_size
        valid = cast("ir.Value", self.frames.valid)
        heads = Heads(
            num_heads=layer.config.num_heads, num_kv_heads=layer.config.num_heads, size=layer.pos_bias_u.shape[1]
        )
        width = heads.num_heads * heads.size
        scale = 1 / math.sqrt(heads.size)

        def grouped(y: ir.Value, *shape: int) -> ir.Value:
            return g.op("Reshape", self._padded(g.op("Mul", y, valid), size), [0, -1, *shape])

        query = g.op("Mul", grouped(linear(g, x, layer.linear_q, "linear_q"), width), scale)
        query = g.op("Add", query, parameter(g, "pos_bias_u", (width,), lambda: layer.pos_bias_u.flatten() * scale))
        parts = [
            grouped(linear(g, x, each, name), heads.num_heads, heads.size)
            for each, name in ((layer.linear_k, "linear_k"), (layer.linear_v, "linear_v"))
        ]
        key_value = g.op("Reshape", g.op("Concat", *parts, axis=-1), [0, -1, 2 * width])
        positions = grouped(linear(g, self.encodings, layer.linear_pos, "linear_pos"), width)
        weight = parameter(g, "position_bias", (width, heads.num_heads), lambda: _position_bias(layer))
        located = g.op("Unsqueeze", g.op("Transpose", product(g, positions, weight), perm=[0, 2, 1]), [2])
        first = g.op("Slice", self.frames.bias, [0], [1 << 40], [3], [size])
        bias = g.op("Add", located, first)
        (context,) = g.call(attention(heads, "relative"), query, key_value, bias, positions)
        frames = g.op("Slice", g.op("Reshape", context, [0, -1, self.config.dim]), [0], self.time, [1])
        return linear(g, frames, layer.linear_out, "linear_out")


def _position_bias(layer: GroupedAttention) -> torch.Tensor:
    """(v - u) / sqrt(size) of each head in the rows of its channels [heads * size, heads]."""
    difference = (layer.pos_bias_v - layer.pos_bias_u) / math.sqrt(layer.pos_bias_u.shape[1])
    num_heads, size = difference.shape
    return (torch.eye(num_heads).unsqueeze(1) * difference.unsqueeze(2)).reshape(num_heads * size, num_heads)
