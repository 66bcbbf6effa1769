"""The encoder as ONNX nodes: what all blocks share, the blocks, and their caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import onnx_ir as ir
import torch

from u2moe.export.attention import MultiHeadAttention, RMSNorm
from u2moe.export.attention_nodes import AttentionNodes, position_biases
from u2moe.export.encoder import ConformerBlock, ConvolutionModule, SpeechEncoder, TransformerBlock
from u2moe.export.layers import (
    Residual,
    feed_forward,
    linear,
    mask_bias,
    normalization,
    parameter,
    product,
    sinusoids,
    transposed,
    vector,
)
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, Operand
from u2moe.runtime.graph.convolution import TimeConvolution


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

    def build(self) -> dict[str, ir.Value]:
        """All nodes; returns the outputs by name."""
        g = self.g
        with g.scope("encoder"):
            x = self._embed()
            output_lens = self._output_lens()
            self._share(x, output_lens)
            if self.config.absolute_positions:
                x = g.op("Add", x, g.op("Slice", self.positions, self.cache_time, [END], [1]))
            residual = Residual(g, x, pre_norm=self.config.pre_norm)
            for index, block in enumerate(self.encoder.encoders):
                with g.scope(f"encoders.{index}"):
                    if isinstance(block, ConformerBlock):
                        self._conformer_block(residual, block, index)
                    elif isinstance(block, TransformerBlock):
                        self._transformer_block(residual, block, index)
            if self.config.pre_norm and self.config.final_norm:
                residual.normalize(self.encoder.after_norm, "after_norm")
            x = residual.total
            outputs = {"output": x, "output_lens": output_lens}
            return outputs | (self._next_caches() if self.streaming else {})

    def _embed(self) -> ir.Value:
        """Normalised and subsampled features [batch, time, dim]."""
        g, embed = self.g, self.encoder.embed
        x = self.inputs["chunk"]
        cmvn = self.encoder.global_cmvn
        if cmvn is not None:
            with g.scope("global_cmvn", group="normalization"):
                x = g.op("Mul", g.op("Sub", x, vector(g, "mean", cmvn.mean)), vector(g, "istd", cmvn.istd))
        projection, name = embed.projection
        kernels, strides = zip(*embed.layers, strict=True)
        form = layers.SubsamplingLayer(kernels=kernels, strides=strides, bins=self.config.input_size)
        with g.scope("embed", group="subsampling"):
            weights = []
            for index in range(0, 2 * len(kernels), 2):
                layer = cast("torch.nn.Conv2d", embed.conv[index])
                weights.append(vector(g, f"conv.{index}.weight", layer.weight))
                weights.append(vector(g, f"conv.{index}.bias", cast("torch.Tensor", layer.bias)))
            weights.append(transposed(g, f"{name}.weight", projection.weight))
            weights.append(vector(g, f"{name}.bias", projection.bias))
            (x,) = g.call(form.function(projection.in_features), x, *weights)
            return g.op("Mul", x, embed.scale)

    def _output_lens(self) -> ir.Value:
        """Encoder frames of each row's valid feature frames [batch]."""
        g, lens = self.g, self.inputs["chunk_lens"]
        with g.scope("output_lens"):
            for kernel, stride in self.encoder.embed.layers:
                # (n - kernel) // stride + 1, and 0 if there are too few; ONNX division truncates towards zero
                lens = g.op("Div", g.op("Max", g.op("Sub", lens, kernel - stride), 0), stride)
        return lens

    def _share(self, x: ir.Value, output_lens: ir.Value) -> None:
        """Sizes, positions and masks that every block uses."""
        g, convolution = self.g, self.config.convolution
        if convolution is not None and convolution.causal and convolution.kernel > 1:
            # the frame that each convolution sees before the first one
            modules = [cast("ConvolutionModule", block.conv_module) for block in self.encoder.encoders]
            with g.scope(group="convolution_state"):
                self.initial_cache = parameter(
                    g,
                    "initial_cache",
                    (len(modules), 1, 1, convolution.channels),
                    lambda: torch.stack([_before_first_frame(module) for module in modules]),
                )
        with g.scope("frames"):
            time = g.op("Shape", x, start=1, end=2)
            offset: Operand = [0]
            self.cache_time: Operand = [0]
            num_keys = time
            if self.streaming:
                self.cache_time = g.op("Shape", self.inputs["att_cache"], start=3, end=4)
                num_keys = g.op("Add", self.cache_time, time)
                offset = self._position(time)
                self._share_caches(num_keys, offset)
            keys = g.op("Range", 0, g.op("Squeeze", num_keys, [0]), 1)
            first = g.op("Unsqueeze", g.op("Sub", offset, self.cache_time), [1])
            index = g.op("Add", first, keys)
            self.end = g.op("Add", offset, output_lens)
            visible = g.op("Less", index, g.op("Unsqueeze", self.end, [1]))
            if self.streaming:
                # positions before the start are padding of a cache that is not full yet
                visible = g.op("And", visible, g.op("GreaterOrEqual", index, 0))
            bias = mask_bias(g, g.op("Unsqueeze", visible, [1, 2]))
            self.valid: ir.Value | None = None
            if not self.streaming:
                self.valid = g.op("Unsqueeze", g.op("Cast", visible, to=ir.DataType.FLOAT), [2])
        self.positions = sinusoids(g, index, self.config.dim)
        self.biases = self._biases(bias)

    def _biases(self, bias: ir.Value) -> Sequence[ir.Value]:
        """What each block adds to its scores: the mask bias and, if positions are relative, the position bias."""
        g, layers = self.g, [cast("MultiHeadAttention", block.self_attn) for block in self.encoder.encoders]
        if not self.config.attention.relative:
            return [bias] * len(layers)
        biases = g.op("Add", position_biases(g, self.positions, layers), bias)
        return g.ops("Split", biases, [self.config.attention.num_heads] * len(layers), axis=1, num_outputs=len(layers))

    def _position(self, time: ir.Value) -> ir.Value:
        """The position of each row's chunk [batch]: `offset`, or as `next_offset` in `contract.encoder` says."""
        g, offset, limit = self.g, self.inputs["offset"], [self.max_position]
        convolution = self.config.convolution
        base = g.op("Max", self.cache_time, [convolution.kernel - 1 if convolution else 0])
        # Equal chunks go from 0 to `first`, and from then on round from `base` to `base` + `length`.
        first = g.op("Mul", g.op("Div", limit, time), time)
        length = g.op("Max", g.op("Mul", g.op("Div", g.op("Sub", limit, base), time), time), [1])
        of_count = g.op("Add", base, g.op("Mod", g.op("Sub", offset, first), length))
        moved = g.op("Where", g.op("Greater", offset, limit), of_count, g.op("Min", offset, base))
        is_late = g.op("Greater", g.op("Add", offset, time), limit)
        is_limited = g.op("GreaterOrEqual", self.inputs["required_cache_size"], 0)
        return g.op("Where", g.op("And", is_late, is_limited), moved, offset)

    def _share_caches(self, num_keys: ir.Value, offset: ir.Value) -> None:
        """Which frames the next call will need, and the frames before the chunk for the convolutions of all blocks."""
        g = self.g
        required = self.inputs["required_cache_size"]
        surplus = g.op("Where", g.op("Less", required, 0), [0], g.op("Max", g.op("Sub", num_keys, required), 0))
        self.first_kept_past = surplus
        self.first_kept_new = g.op("Max", g.op("Sub", surplus, self.cache_time), 0)
        convolution = self.config.convolution
        if convolution is not None and "cnn_cache" in self.inputs:
            past = g.constant(torch.arange(1 - convolution.kernel, 0).numpy())
            index = g.op("Add", g.op("Unsqueeze", offset, [1]), past)
            exists = g.op("Unsqueeze", g.op("GreaterOrEqual", index, 0), [2])
            cached = g.op("Transpose", self.inputs["cnn_cache"], perm=[0, 1, 3, 2])
            self.histories = g.op("Where", exists, cached, self.initial_cache)

    def _next_caches(self) -> dict[str, ir.Value]:
        """Caches for the next call: the keys and values to keep, from the past and from this call."""
        g = self.g
        with g.scope("caches"):
            kept = g.op("Slice", self.inputs["att_cache"], self.first_kept_past, [END], [3])
            caches = {"next_offset": self.end}
            caches["r_att_cache"] = g.op("Concat", kept, g.op("Concat", *self.next_att, axis=0), axis=3)
            if self.next_cnn:
                last = g.op("Concat", *self.next_cnn, axis=0)
                caches["r_cnn_cache"] = g.op("Transpose", last, perm=[0, 1, 3, 2])
            return caches

    def _conformer_block(self, residual: Residual, block: ConformerBlock, index: int) -> None:
        macaron, convolution = block.feed_forward_macaron, block.conv_module
        if macaron is not None:
            layer = self._feed_forward(macaron, "feed_forward_macaron", block.scale)
            residual.add(layer, block.norm_ff_macaron, "norm_ff_macaron")
        residual.add(lambda x: self._self_attention(x, block, index), block.norm_mha, "norm_mha")
        if convolution is not None:
            residual.add(lambda x: self._convolution(x, convolution, index), block.norm_conv, "norm_conv")
        residual.add(self._feed_forward(block.feed_forward, "feed_forward", block.scale), block.norm_ff, "norm_ff")
        if convolution is not None:
            residual.normalize(block.norm_final, "norm_final")

    def _transformer_block(self, residual: Residual, block: TransformerBlock, index: int) -> None:
        residual.add(lambda x: self._self_attention(x, block, index), block.norm1, "norm1")
        residual.add(self._feed_forward(block.feed_forward, "feed_forward"), block.norm2, "norm2")

    def _feed_forward(self, layer: torch.nn.Module, name: str, scale: float = 1.0) -> Callable[[ir.Value], ir.Value]:
        return lambda x: feed_forward(self.g, x, layer, self.config.feed_forward.activation, name, scale)

    def _self_attention(self, x: ir.Value, block: ConformerBlock | TransformerBlock, index: int) -> ir.Value:
        g = self.g
        with g.scope("self_attn", group="attention"):
            nodes = AttentionNodes(g, block.self_attn)
            if not self.streaming:
                return nodes.attend(x, x, self.biases[index], self.positions)
            cache = [self.inputs["att_cache"], g.constant(index), self.first_kept_new]
            y, kept = nodes.attend_with_cache(x, cache, self.biases[index], self.positions)
            self.next_att.append(kept)
            return y

    def _convolution(self, x: ir.Value, module: ConvolutionModule, index: int) -> ir.Value:
        g, config = self.g, module.config
        with g.scope("conv_module", group="pointwise_convolutions"):
            # both halves of the gated linear unit as separate products: nothing has to be split
            inputs = [self._half(x, module, half) for half in range(2)]
            weights = self._weights(module)
            is_rms = isinstance(module.norm, RMSNorm)
            has_norm = isinstance(module.norm, torch.nn.LayerNorm)
            form = TimeConvolution(
                kernel=config.kernel,
                activation="" if is_rms else config.activation,
                bias=len(weights) - 2 * has_norm > 1,
                norm=has_norm,
                epsilon=config.norm.eps if has_norm else 0.0,
            )
            history = [g.constant(index)] if config.causal and config.kernel > 1 else []
            if not config.causal:
                (y,) = g.call(form.centred(config.channels), *inputs, cast("ir.Value", self.valid), *weights)
            elif history and self.streaming:
                y, kept = g.call(form.cached(config.channels), *inputs, self.histories, *history, *weights)
                self.next_cnn.append(kept)
            else:
                history = [self.initial_cache, *history] if history else []
                (y,) = g.call(form.causal(config.channels), *inputs, *history, *weights)
            if is_rms:
                y = normalization(g, y, module.norm, "norm")
                y = g.call(layers.activation_layer(config.activation), y)[0]
            # padded frames may hold anything from here on: no valid frame depends on them
            return linear(g, y, module.pointwise_conv2, "pointwise_conv2")

    def _half(self, x: ir.Value, module: ConvolutionModule, half: int) -> ir.Value:
        """One half of the gated linear unit's projection: 0 the linear one, 1 the gate."""
        g, layer, size = self.g, module.pointwise_conv1, module.config.channels
        rows, bias = slice(half * size, (half + 1) * size), layer.bias
        with g.scope("pointwise_conv1", ("linear", "gate")[half]):
            weights = [parameter(g, "weight", (layer.in_channels, size), lambda: layer.weight[rows, :, 0].T)]
            if bias is not None:
                weights.append(parameter(g, "bias", (size,), lambda: bias[rows]))
            return product(g, x, *weights)

    def _weights(self, module: ConvolutionModule) -> list[ir.Value]:
        """Of the depthwise convolution, which batch normalisation is folded into, and of a layer normalisation."""
        g, config, layer, norm = self.g, module.config, module.depthwise_conv, module.norm
        folded = isinstance(norm, torch.nn.BatchNorm1d)

        def weight() -> torch.Tensor:
            scale = scale_and_shift(norm)[0] if isinstance(norm, torch.nn.BatchNorm1d) else 1.0
            return (layer.weight.double().permute(1, 2, 0) * scale).permute(2, 0, 1).unsqueeze(2)

        def bias() -> torch.Tensor:
            own = torch.zeros(config.channels) if layer.bias is None else layer.bias
            scale, shift = scale_and_shift(norm) if isinstance(norm, torch.nn.BatchNorm1d) else (1.0, 0.0)
            return own.double() * scale + shift

        with g.scope("depthwise_conv", group="depthwise_convolutions"):
            weights = [parameter(g, "weight", (config.channels, 1, 1, config.kernel), weight)]
            if folded or layer.bias is not None:
                weights.append(parameter(g, "bias", (config.channels,), bias))
        if isinstance(norm, torch.nn.LayerNorm):
            with g.scope("norm", group="normalization"):
                weights += [vector(g, "weight", norm.weight), vector(g, "bias", norm.bias)]
        return weights


def scale_and_shift(layer: torch.nn.BatchNorm1d) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift that batch normalisation applies to each channel at inference."""
    variance, mean = cast("torch.Tensor", layer.running_var), cast("torch.Tensor", layer.running_mean)
    scale = layer.weight.double() / (variance.double() + layer.eps).sqrt()
    return scale, layer.bias.double() - mean.double() * scale


def _before_first_frame(module: ConvolutionModule) -> torch.Tensor:
    """The frame that `initial_cache` repeats [1, 1, channels].

    Computed in float64 and rounded: sigmoids of torch depend on the processor in their last bit.
    """
    bias, channels = module.pointwise_conv1.bias, module.config.channels
    if bias is None:
        return torch.zeros(1, 1, channels)
    values, gates = bias.double().chunk(2)
    divisors = [1 + math.exp(min(-gate, 700.0)) for gate in gates.tolist()]
    return (values / torch.tensor(divisors, dtype=torch.float64)).float().view(1, 1, channels)
