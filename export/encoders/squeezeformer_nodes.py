"""The Squeezeformer encoder as layers of a graph. Scales and shifts of inputs are folded into the following layers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TypeVar, cast

import onnx_ir as ir
from torch import Tensor, nn

from u2moe.export.convolution import convolution, initial_cache
from u2moe.export.encoders.network import CNN_CACHE
from u2moe.export.encoders.nodes import EncoderNodes, FrameNodes
from u2moe.export.encoders.squeezeformer import (
    HALF_ATT_CACHE,
    Scaling,
    SqueezeAttention,
    Squeezed,
    SqueezeformerBlock,
    SqueezeformerEncoder,
)
from u2moe.export.layers import (
    AttentionNodes,
    Residual,
    affine,
    linear,
    normalization,
    parameter,
    product,
    sinusoids,
    vector,
)
from u2moe.runtime.graph.attention import END, shifted_attention, shifted_places
from u2moe.runtime.graph.convolution import ReducingConvolution

Product = TypeVar("Product", nn.Linear, nn.Conv1d)
Scaled = TypeVar("Scaled", bound=Scaling)


class SqueezeformerNodes(EncoderNodes):
    """Builds the encoder as layers of a graph."""

    own: Squeezed

    @property
    def _longest_history(self) -> int:
        """See `EncoderNodes`. The blocks at half the frame rate have the longest history."""
        return 2 * super()._longest_history

    def _share(self, x: ir.Value) -> None:
        g = self.g
        super()._share(x)
        start = initial_cache(g, [cast("SqueezeformerBlock", block).conv_module for block in self.encoder.encoders])
        with g.scope("half_frames"):
            self.time = g.op("Shape", x, start=1, end=2)
            time, lens = (g.op("Div", g.op("Add", length, 1), 2) for length in (self.time, self.output_lens))
            cache, required = (self.inputs.get(name) for name in (HALF_ATT_CACHE, "required_cache_size"))
            half = FrameNodes(g, time, lens, self.offset, 2, cache, required)
        self.rates = [Rate(self, self.frames, start, half=False), Rate(self, half, start, half=True)]
        self.seen, reduced = (rate.seen for rate in self.rates)
        self.rates[1].seen = replace(reduced, kept=self.seen.kept)  # one cache for the blocks of both rates

    def _run_blocks(self, x: ir.Value) -> ir.Value:
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
                self._layers(residual, cast("SqueezeformerBlock", block), rate, index)
            x = residual.total
        return x

    def _layers(self, residual: Residual, block: SqueezeformerBlock, rate: Rate, index: int) -> None:
        g = self.g
        residual.add(lambda x: rate.attend(x, block.self_attn), block.layer_norm1, "layer_norm1")
        residual.add(self.feed_forward(folded(block.ffn1, "w_1"), "ffn1"), block.layer_norm2, "layer_norm2")
        module = folded(block.conv_module, "pointwise_conv1")
        residual.add(lambda x: convolution(g, x, module, rate.seen, index), block.layer_norm3, "layer_norm3")
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

    def _next_caches(self) -> dict[str, ir.Value]:
        return super()._next_caches() | {f"r_{HALF_ATT_CACHE}": self.rates[1].frames.next_attention_cache()}


class Rate:
    """State shared by the blocks of one frame rate."""

    def __init__(self, nodes: SqueezeformerNodes, frames: FrameNodes, start: ir.Value | None, *, half: bool) -> None:
        self.g, self.frames, self.row = nodes.g, frames, 0
        blocks = [cast("SqueezeformerBlock", block) for block in nodes.encoder.encoders]
        layers = [block.self_attn for index, block in enumerate(blocks) if nodes.own.is_half(index) == half]
        with self.g.scope("half" if half else "full", group="positions"):
            self.encodings = sinusoids(self.g, frames.positions, nodes.config.dim)
            if nodes.own.shifted:
                self.places = shifted_places(self.g, self.g.op("Shape", frames.positions, start=1, end=2), frames.lens)
            else:
                self.biases = frames.biases(layers, [self.encodings])
            self.seen = frames.surroundings(start, nodes.inputs.get(CNN_CACHE))

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
        g, scale = self.g, 1 / math.sqrt(layer.config.head_dim)
        query = product(g, x, *affine(g, layer.linear_q, "linear_q.", scale))
        pairs = (("pos_bias_u", layer.pos_bias_u), ("pos_bias_v", layer.pos_bias_v))
        biases = [vector(g, name, weight.flatten(), scale) for name, weight in pairs]
        positions = linear(g, self.encodings, layer.linear_pos, "linear_pos")
        inputs = [query, nodes.key_value(x), self.frames.bias, positions, *biases, self.places]
        return linear(g, g.call(shifted_attention(nodes.heads), *inputs)[0], layer.linear_out, "linear_out")


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
