"""The Squeezeformer encoder as layers of a graph. Scales and shifts of inputs are folded into the following layers."""

from __future__ import annotations

import copy
import math
from typing import TypeVar, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.attention_nodes import AttentionNodes
from u2moe.export.convolution import Surroundings, convolution, initial_cache
from u2moe.export.encoders.network import CNN_CACHE
from u2moe.export.encoders.nodes import EncoderNodes, FrameNodes
from u2moe.export.encoders.squeezeformer import (
    HALF_ATT_CACHE,
    Scaling,
    SqueezeAttention,
    Squeezed,
    SqueezeformerBlock,
    SqueezeformerEncoder,
    SqueezeSubsampling,
)
from u2moe.export.layers import Residual, affine, linear, normalization, parameter, product, transposed, vector
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.attention import END, Heads, shifted_attention, shifted_places
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.convolution import ReducingConvolution

Product = TypeVar("Product", nn.Linear, nn.Conv1d)
Scaled = TypeVar("Scaled", bound=Scaling)


class SqueezeformerNodes(EncoderNodes):
    """Builds the encoder as layers of a graph."""

    @property
    def own(self) -> Squeezed:
        """Settings that only this encoder has."""
        return cast("Squeezed", self.config.own)

    @property
    def longest_history(self) -> int:
        """See `EncoderNodes`. The blocks at half the frame rate have the longest history."""
        return 2 * super().longest_history

    def embed(self, x: ir.Value) -> ir.Value:
        """See `EncoderNodes`."""
        return subsampled(self.g, x, cast("SqueezeSubsampling", self.encoder.embed), self.config.input_size)

    def share(self, x: ir.Value) -> None:
        """See `EncoderNodes`."""
        g = self.g
        super().share(x)
        start = initial_cache(g, [cast("SqueezeformerBlock", block).conv_module for block in self.encoder.encoders])
        with g.scope("half_frames"):
            self.time = g.op("Shape", x, start=1, end=2)
            time, lens = (g.op("Div", g.op("Add", length, 1), 2) for length in (self.time, self.output_lens))
            cache, required = (self.inputs.get(name) for name in (HALF_ATT_CACHE, "required_cache_size"))
            half = FrameNodes(g, time=time, lens=lens, offset=self.offset, step=2, cache=cache, required=required)
        self.rates = [Rate(self, self.frames, start, half=False), Rate(self, half, start, half=True)]

    def run_blocks(self, x: ir.Value) -> ir.Value:
        """See `EncoderNodes`."""
        g, own, encoder = self.g, self.own, cast("SqueezeformerEncoder", self.encoder)
        full = x = normalization(g, x, encoder.preln, "preln")
        for index, block in enumerate(encoder.encoders):
            if index == own.reduce:
                full, x = x, self._reduced(x)
            if index == own.recover:
                with g.scope(group="pointwise_convolutions"):
                    once = g.op("Unsqueeze", linear(g, x, encoder.time_recover_layer, "time_recover_layer"), [2])
                twice = g.op("Reshape", g.op("Concat", once, once, axis=2), [0, -1, self.config.dim])
                x = g.op("Add", full, g.op("Slice", twice, [0], self.time, [1]))
            rate, residual = self.rates[own.is_half(index)], Residual(g, x, pre_norm=self.config.pre_norm)
            with g.scope(f"encoders.{index}"):
                self._block(residual, cast("SqueezeformerBlock", block), rate, index)
            x = residual.total
        return x

    def _block(self, residual: Residual, block: SqueezeformerBlock, rate: Rate, index: int) -> None:
        g = self.g
        residual.add(lambda x: rate.attend(x, block.self_attn), block.layer_norm1, "layer_norm1")
        residual.add(self.feed_forward(folded(block.ffn1, "w_1"), "ffn1"), block.layer_norm2, "layer_norm2")

        def convolved(x: ir.Value) -> ir.Value:
            return self.kept(convolution(g, x, folded(block.conv_module, "pointwise_conv1"), rate.seen, index))

        residual.add(convolved, block.layer_norm3, "layer_norm3")
        residual.add(self.feed_forward(folded(block.ffn2, "w_1"), "ffn2"), block.layer_norm4, "layer_norm4")

    def _reduced(self, x: ir.Value) -> ir.Value:
        """Return `x` at half the frame rate, as [batch, (time + 1) // 2, dim]."""
        g, layer = self.g, cast("SqueezeformerEncoder", self.encoder).time_reduction_layer
        weights, bias = layer.dw_conv.weight, cast("Tensor", layer.dw_conv.bias)
        with g.scope("time_reduction_layer", group="pointwise_convolutions"):
            if layer.kind == "stream":
                x = g.op("Slice", x, [0], [END], [1], [2])
                return linear(g, x, scaled(layer.pw_conv, weights, bias), "pw_conv")
            kernel, before = layer.KERNELS[layer.kind], layer.BEFORE[layer.kind]
            form = ReducingConvolution(kernel=kernel, stride=2, before=before, after=kernel - before - 1)
            with g.scope("dw_conv", group="depthwise_convolutions"):
                shape = (self.config.dim, 1, 1, kernel)
                taps = parameter(g, "weight", shape, lambda: weights.unsqueeze(2)), vector(g, "bias", bias)
            valid = cast("ir.Value", self.frames.valid)
            return linear(g, g.call(form.function(self.config.dim), x, valid, *taps)[0], layer.pw_conv, "pw_conv")

    def next_caches(self) -> dict[str, ir.Value]:
        """See `EncoderNodes`."""
        return super().next_caches() | {f"r_{HALF_ATT_CACHE}": self.rates[1].frames.next_attention_cache()}


class Rate:
    """State shared by the blocks of one frame rate."""

    def __init__(self, nodes: SqueezeformerNodes, frames: FrameNodes, start: ir.Value | None, *, half: bool) -> None:
        g = nodes.g
        self.g, self.frames = g, frames
        self.row = 0
        every = [cast("SqueezeformerBlock", block) for block in nodes.encoder.encoders]
        blocks = [block for index, block in enumerate(every) if nodes.own.is_half(index) == half]
        with g.scope("half" if half else "full", group="positions"):
            self.encodings = frames.sinusoids(nodes.config.dim)
            if blocks[0].self_attn.shifted:
                time = g.op("Shape", frames.positions, start=1, end=2)
                self.places = shifted_places(g, time, frames.lens)
            else:
                self.biases = frames.biases([block.self_attn for block in blocks], [self.encodings])
            if start is not None and CNN_CACHE in nodes.inputs:
                start = frames.history(nodes.inputs[CNN_CACHE], start)
        self.seen = Surroundings(start, frames.valid, nodes.streaming)

    def attend(self, x: ir.Value, layer: SqueezeAttention) -> ir.Value:
        """Apply the attention of the next block at this frame rate."""
        g, row, adapted = self.g, self.row, folded(layer, "linear_q", "linear_k", "linear_v")
        self.row += 1
        with g.scope("self_attn", group="attention"):
            nodes = AttentionNodes(g, adapted)
            if layer.shifted:
                return self._shifted(x, adapted, nodes)
            return self.frames.attend(nodes, x, self.biases[row], [self.encodings], row)

    def _shifted(self, x: ir.Value, layer: SqueezeAttention, nodes: AttentionNodes) -> ir.Value:
        g, config = self.g, layer.config
        scale = 1 / math.sqrt(config.head_dim)
        size = config.num_heads * config.head_dim
        query = product(g, x, *affine(g, layer.linear_q, "linear_q.", scale))
        biases = [
            parameter(g, "pos_bias_u", (size,), lambda: layer.pos_bias_u.flatten() * scale),
            parameter(g, "pos_bias_v", (size,), lambda: layer.pos_bias_v.flatten() * scale),
        ]
        positions = linear(g, self.encodings, layer.linear_pos, "linear_pos")
        form = shifted_attention(Heads(num_heads=config.num_heads, num_kv_heads=config.num_heads, size=config.head_dim))
        inputs = [query, nodes.key_value(x), self.frames.bias, positions, *biases, self.places]
        return linear(g, g.call(form, *inputs)[0], layer.linear_out, "linear_out")


def subsampled(g: GraphBuilder, features: ir.Value, layer: SqueezeSubsampling, bins: int) -> ir.Value:
    """Apply the convolutions and the projection. A depthwise convolution becomes a full one with many zeros."""
    channels = layer.pw_conv.out_channels

    def weight() -> Tensor:
        if layer.dw_conv.groups == 1:
            return layer.dw_conv.weight
        return torch.eye(channels)[:, :, None, None] * layer.dw_conv.weight

    form = layers.SubsamplingLayer(kernels=(3, 3), strides=(2, 2), bins=bins)
    projection = cast("nn.Linear", layer.input_proj[0])
    with g.scope("embed", group="subsampling"):
        weights = [
            vector(g, "pw_conv.weight", layer.pw_conv.weight),
            vector(g, "pw_conv.bias", cast("Tensor", layer.pw_conv.bias)),
            parameter(g, "dw_conv.weight", (channels, channels, 3, 3), weight),
            vector(g, "dw_conv.bias", cast("Tensor", layer.dw_conv.bias)),
            transposed(g, "input_proj.0.weight", projection.weight, layer.scale),
            vector(g, "input_proj.0.bias", projection.bias),
        ]
        return g.call(form.function(projection.in_features), features, *weights)[0]


def folded(layer: Scaled, *names: str) -> Scaled:
    """Return a copy of a layer, with the scale and shift of its input folded into its submodules `names`."""
    adapted = copy.deepcopy(layer)
    if layer.adaptive:
        for name in names:
            part = getattr(layer, name)  # linear, or a convolution of kernel 1
            setattr(adapted, name, scaled(cast("nn.Linear", part), layer.ada_scale, layer.ada_bias))
    return adapted


def scaled(layer: Product, scale: Tensor, shift: Tensor) -> Product:
    """Return a layer whose output for x equals the output of `layer` for `x * scale + shift`."""
    adapted = copy.deepcopy(layer)
    weight, width = layer.weight.double().flatten(1), (1, -1) if layer.weight.ndim == 2 else (1, -1, 1)
    bias = weight @ shift.double().flatten() + cast("Tensor", layer.bias).double()
    adapted.weight = nn.Parameter((layer.weight.double() * scale.double().view(width)).float(), requires_grad=False)
    adapted.bias = nn.Parameter(bias.float(), requires_grad=False)
    return adapted
