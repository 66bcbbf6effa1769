"""The Efficient Conformer encoder as layers of a graph."""

import math
from dataclasses import replace
from typing import cast

import onnx_ir as ir
import torch
from torch import nn

from u2moe.export.attention_nodes import AttentionNodes
from u2moe.export.convolution import ConvolutionModule, Surroundings, convolution_parts, initial_cache
from u2moe.export.encoders.conformer import ConformerBlock, ConformerNodes
from u2moe.export.encoders.efficient_conformer import CACHES, EfficientBlock, GroupedAttention, Strided, cache_name
from u2moe.export.encoders.nodes import FrameNodes, next_history
from u2moe.export.layers import Residual, linear, parameter, product
from u2moe.runtime.graph.attention import END, Heads, attention, to_heads
from u2moe.runtime.graph.convolution import ReducingConvolution


class EfficientConformerNodes(ConformerNodes):
    """Builds the encoder as layers of a graph."""

    @property
    def own(self) -> Strided:
        """Settings that only this encoder has."""
        return cast("Strided", self.config.own)

    @property
    def longest_history(self) -> int:
        """See `EncoderNodes`."""
        longest = max((kernel - 1) * self.own.step(index) for index, kernel in enumerate(self.own.kernels))
        return longest + -longest % self.config.frame_reduction

    def share(self, x: ir.Value) -> None:
        """See `EncoderNodes`."""
        modules = [cast("ConvolutionModule", block.conv_module) for block in self.encoder.encoders]
        self.start = initial_cache(self.g, modules)
        self.following: dict[str, ir.Value] = {}
        time = self.g.op("Shape", x, start=1, end=2)
        with self.g.scope("frames"):
            self.offset = self._position(time) if self.streaming else [0]
            required = self.inputs.get("required_cache_size")
            self.required = None if required is None else self.g.op("Mul", required, self.config.frame_reduction)
        self._enter(time, 1)

    def _enter(self, time: ir.Value, step: int) -> None:
        """Start building the blocks that share a frame rate."""
        g, blocks, start = self.g, self.own.rates().get(step, range(0)), self.start
        self.time, self.step, self.blocks = time, step, blocks
        attention, history = (self.inputs.get(cache_name(each, step)) for each in CACHES)
        with g.scope(f"frames_{step}"):
            lens, required = self.output_lens, None if attention is None else self.required
            self.frames = FrameNodes(
                g, time=time, lens=lens, offset=self.offset, step=step, cache=attention, required=required
            )
            self.exists = g.op("Unsqueeze", g.op("Cast", self.frames.visible, to=ir.DataType.FLOAT), [2])
            self.valid = g.op("Slice", self.exists, self.frames.cache_time, [END], [1])
            self.encodings = self.frames.sinusoids(self.config.dim)
            if not blocks or self.own.kernels[blocks.start] == 1:
                start = None
            if start is not None:
                start = g.op("Slice", start, [blocks.start], [blocks.stop], [0])
                start = start if history is None else self.frames.history(history, start)
        self.seen = Surroundings(start, self.frames.valid, self.streaming)

    def _leave(self) -> None:
        """Store the new caches of the blocks at the current frame rate."""
        attention, history = (f"r_{cache_name(each, self.step)}" for each in CACHES)
        if self.frames.kept:
            self.following[attention] = self.frames.next_attention_cache()
        if self.next_cnn:
            self.following[history] = next_history(self.g, self.next_cnn)
        self.next_cnn = []

    def next_caches(self) -> dict[str, ir.Value]:
        """See `EncoderNodes`."""
        self._leave()
        return self.following

    def add_convolution(self, residual: Residual, block: ConformerBlock, module: ConvolutionModule, index: int) -> None:
        """See `ConformerNodes`. For a strided convolution, residual frames are averaged before its output is added."""
        g, row, stride = self.g, index - self.blocks.start, cast("EfficientBlock", block).stride
        if stride == 1:
            super().add_convolution(residual, block, module, row)
            return
        pre_norm = self.config.pre_norm
        branch = residual.normalized(block.norm_conv, "norm_conv") if pre_norm else residual.total
        branch = self._reduced(branch, module, stride, row)
        average = self._averaged(residual.total, stride)
        self.output_lens = g.op("Div", g.op("Add", self.output_lens, stride - 1), stride)
        self._leave()
        self._enter(g.op("Div", g.op("Add", self.time, stride - 1), stride), self.step * stride)
        residual.replace(average, branch)
        if not pre_norm:
            residual.normalize(block.norm_conv, "norm_conv")

    def _reduced(self, x: ir.Value, module: ConvolutionModule, stride: int, row: int) -> ir.Value:
        g, config = self.g, module.config
        valid = self.valid
        padding = (config.kernel - 1) // 2
        form = ReducingConvolution(kernel=config.kernel, stride=stride, before=padding, after=padding)
        seen, taps, finish = convolution_parts(g, x, module)
        if config.causal:
            form, valid = replace(form, before=0, after=0), g.constant(torch.ones(1, 1, 1).numpy())
            if self.seen.histories is not None:
                past = g.op("Gather", self.seen.histories, g.constant(row), axis=0)
                shape = g.op("Concat", g.op("Shape", seen, end=1), [config.kernel - 1, config.channels], axis=0)
                seen = g.op("Concat", g.op("Expand", past, shape), seen, axis=1)
                kept = g.op("Unsqueeze", g.op("Slice", seen, [1 - config.kernel], [END], [1]), [0])
                self.next_cnn += [kept] if self.streaming else []
        return finish(g.call(form.function(config.channels), seen, valid, *taps)[0])

    def _averaged(self, x: ir.Value, stride: int) -> ir.Value:
        """Return averages [batch, ceil(time / stride), dim] of `stride` frames each; only existing frames count."""
        g, valid = self.g, self.valid

        def total(values: ir.Value, width: int) -> ir.Value:
            padded = self._padded(values, stride)
            return g.op("ReduceSum", g.op("Reshape", padded, [0, -1, stride, width]), [2], keepdims=0)

        number = g.op("Max", total(valid, 1), 1.0)
        return g.op("Div", total(g.op("Mul", x, valid), self.config.dim), number)

    def _padded(self, x: ir.Value, size: int) -> ir.Value:
        """Pad [batch, time, ...] with zeros at the end, until the number of frames is a multiple of `size`."""
        g = self.g
        missing = g.op("Mod", g.op("Sub", [0], self.time), [size])
        return g.op("Pad", x, g.op("Concat", [0, 0, 0, 0], missing, [0], axis=0))

    def self_attention(self, x: ir.Value, block: nn.Module, index: int) -> ir.Value:
        """See `EncoderNodes`."""
        layer, row = self.attention_of(block), index - self.blocks.start
        with self.g.scope(self.ATTENTION, group="attention"):
            if isinstance(layer, GroupedAttention):
                return self._grouped(x, layer, row)
            (bias,) = self.frames.biases([layer], [self.encodings])
            return self.frames.attend(AttentionNodes(self.g, layer), x, bias, [self.encodings], row)

    def _grouped(self, x: ir.Value, layer: GroupedAttention, row: int) -> ir.Value:
        """Attend between groups of frames: adjacent frames form one vector, which is then split into heads."""
        g, size = self.g, layer.group_size
        num_heads, head_dim = layer.pos_bias_u.shape
        heads = Heads(num_heads=num_heads, num_kv_heads=num_heads, size=head_dim)
        width = heads.num_heads * heads.size
        scale = 1 / math.sqrt(heads.size)

        def grouped(y: ir.Value, exists: ir.Value, *shape: int) -> ir.Value:
            return g.op("Reshape", self._padded(g.op("Mul", y, exists), size), [0, -1, *shape])

        query = g.op("Mul", grouped(linear(g, x, layer.linear_q, "linear_q"), self.valid, width), scale)
        query = g.op("Add", query, parameter(g, "pos_bias_u", (width,), lambda: layer.pos_bias_u.flatten() * scale))
        own = layer.config.head_dim
        both = to_heads(g, AttentionNodes(g, layer).key_value(x), heads.num_heads, 2 * own)
        if self.streaming:
            kept = g.op("Slice", both, self.frames.first_kept_new, [END], [2])
            self.frames.kept.append(g.op("Unsqueeze", kept, [0]))
            both = g.op("Concat", g.op("Gather", self.frames.cache, g.constant(row), axis=0), both, axis=2)
        parts = []
        for part in g.ops("Split", both, [own, own], axis=-1, num_outputs=2):
            frames = g.op("Reshape", g.op("Transpose", part, perm=[0, 2, 1, 3]), [0, 0, heads.num_heads * own])
            parts.append(grouped(frames, self.exists, heads.num_heads, heads.size))
        key_value = g.op("Reshape", g.op("Concat", *parts, axis=-1), [0, -1, 2 * width])
        positions = grouped(linear(g, self.encodings, layer.linear_pos, "linear_pos"), self.exists, width)
        weight = parameter(g, "position_bias", (width, heads.num_heads), lambda: _position_bias(layer))
        located = g.op("Unsqueeze", g.op("Transpose", product(g, positions, weight), perm=[0, 2, 1]), [2])
        first = g.op("Slice", self.frames.bias, [0], [END], [3], [size])
        bias = g.op("Add", located, first)
        (context,) = g.call(attention(heads, "relative"), query, key_value, bias, positions)
        frames = g.op("Slice", g.op("Reshape", context, [0, -1, self.config.dim]), [0], self.time, [1])
        return linear(g, frames, layer.linear_out, "linear_out")


def _position_bias(layer: GroupedAttention) -> torch.Tensor:
    """Return (v - u) / sqrt(size) as [heads * size, heads]. The column of a head is zero outside that head's rows."""
    difference = (layer.pos_bias_v - layer.pos_bias_u) / math.sqrt(layer.pos_bias_u.shape[1])
    num_heads, size = difference.shape
    return (torch.eye(num_heads).unsqueeze(1) * difference.unsqueeze(2)).reshape(num_heads * size, num_heads)
