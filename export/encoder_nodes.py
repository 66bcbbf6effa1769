"""The encoder as ONNX nodes: what all blocks share, the blocks, and their caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import onnx_ir as ir
import torch

from u2moe.export.attention import MultiHeadAttention
from u2moe.export.encoder import ConformerBlock, ConvolutionModule, SpeechEncoder, Subsampling, TransformerBlock
from u2moe.export.layers import (
    AttentionNodes,
    feed_forward,
    linear,
    mask_bias,
    normalization,
    parameter,
    pointwise_convolution,
    position_biases,
    scale_and_shift,
    sinusoids,
    vector,
)
from u2moe.runtime.graph.activation import activation
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

    def build(self) -> dict[str, ir.Value]:
        """All nodes; returns the outputs by name."""
        g = self.g
        with g.scope("encoder"):
            x = self._embed()
            output_lens = self._output_lens()
            self._share(x, output_lens)
            if self.config.absolute_positions:
                x = g.op("Add", x, g.op("Slice", self.positions, self.cache_time, [END], [1]))
            for index, block in enumerate(self.encoder.encoders):
                with g.scope(f"encoders.{index}"):
                    if isinstance(block, ConformerBlock):
                        x = self._conformer_block(x, block, index)
                    elif isinstance(block, TransformerBlock):
                        x = self._transformer_block(x, block, index)
            if self.config.pre_norm and self.config.final_norm:
                x = normalization(g, x, self.encoder.after_norm, "after_norm")
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
        with g.scope("embed", group="subsampling"):
            x = g.op("Unsqueeze", x, [1])
            for index, (kernel, stride) in enumerate(embed.layers):
                layer = cast("torch.nn.Conv2d", embed.conv[2 * index])
                bias_tensor = cast("torch.Tensor", layer.bias)
                with g.scope(f"conv.{2 * index}"):
                    weight, bias = vector(g, "weight", layer.weight), vector(g, "bias", bias_tensor)
                    x = g.op("Conv", x, weight, bias, kernel_shape=[kernel, kernel], strides=[stride, stride])
                    x = g.op("Relu", x)
            x = g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3]), [0, 0, self._flat_size(embed)])
            x = linear(g, x, *embed.projection)
            return g.op("Mul", x, embed.scale)

    def _flat_size(self, embed: Subsampling) -> int:
        return self.config.dim * embed.output_length(self.config.input_size)

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

    def _branch(self, x: ir.Value, layer: torch.nn.Module, name: str) -> ir.Value:
        return normalization(self.g, x, layer, name) if self.config.pre_norm else x

    def _join(self, x: ir.Value, branch: ir.Value, layer: torch.nn.Module, name: str) -> ir.Value:
        x = self.g.op("Add", x, branch)
        return x if self.config.pre_norm else normalization(self.g, x, layer, name)

    def _conformer_block(self, x: ir.Value, block: ConformerBlock, index: int) -> ir.Value:
        kind = self.config.feed_forward.activation
        if block.feed_forward_macaron is not None:
            branch = self._branch(x, block.norm_ff_macaron, "norm_ff_macaron")
            branch = feed_forward(self.g, branch, block.feed_forward_macaron, kind, "feed_forward_macaron", block.scale)
            x = self._join(x, branch, block.norm_ff_macaron, "norm_ff_macaron")
        branch = self._self_attention(self._branch(x, block.norm_mha, "norm_mha"), block, index)
        x = self._join(x, branch, block.norm_mha, "norm_mha")
        if block.conv_module is not None:
            branch = self._convolution(self._branch(x, block.norm_conv, "norm_conv"), block.conv_module, index)
            x = self._join(x, branch, block.norm_conv, "norm_conv")
        branch = self._branch(x, block.norm_ff, "norm_ff")
        branch = feed_forward(self.g, branch, block.feed_forward, kind, "feed_forward", block.scale)
        x = self._join(x, branch, block.norm_ff, "norm_ff")
        return x if block.conv_module is None else normalization(self.g, x, block.norm_final, "norm_final")

    def _transformer_block(self, x: ir.Value, block: TransformerBlock, index: int) -> ir.Value:
        branch = self._self_attention(self._branch(x, block.norm1, "norm1"), block, index)
        x = self._join(x, branch, block.norm1, "norm1")
        kind = self.config.feed_forward.activation
        branch = feed_forward(self.g, self._branch(x, block.norm2, "norm2"), block.feed_forward, kind, "feed_forward")
        return self._join(x, branch, block.norm2, "norm2")

    def _self_attention(self, x: ir.Value, block: ConformerBlock | TransformerBlock, index: int) -> ir.Value:
        g = self.g
        with g.scope("self_attn", group="attention"):
            nodes = AttentionNodes(g, block.self_attn)
            key_value = nodes.key_value(x)
            if self.streaming:
                with g.scope("cache"):
                    kept = g.op("Slice", key_value, self.first_kept_new, [END], [2])
                    self.next_att.append(g.op("Unsqueeze", kept, [0]))
                    past = g.op("Gather", self.inputs["att_cache"], index, axis=0)
                    key_value = g.op("Concat", past, key_value, axis=2)
            return nodes.attend(nodes.query(x), key_value, self.biases[index], self.positions)

    def _convolution(self, x: ir.Value, module: ConvolutionModule, index: int) -> ir.Value:
        g, config = self.g, module.config
        with g.scope("conv_module", group="pointwise_convolutions"):
            # both halves of the gated linear unit as separate products: nothing has to be split
            linear_half, gate = (self._half(x, module, half) for half in range(2))
            y = g.op("Mul", linear_half, g.op("Sigmoid", gate))
            if self.valid is not None and not config.causal:
                # padding must look like the end of the audio: WeNet zeroes it before the unit, leaving only the bias
                y = g.op("Mul", y, self.valid)
            if config.causal:
                y = self._with_history(y, module, index)
            y = activation(g, self._depthwise(y, module), config.activation)
            # padded frames may hold anything from here on: no valid frame depends on them
            return pointwise_convolution(g, y, module.pointwise_conv2, "pointwise_conv2")

    def _half(self, x: ir.Value, module: ConvolutionModule, half: int) -> ir.Value:
        """One half of the gated linear unit's projection: 0 the linear one, 1 the gate."""
        g, layer, size = self.g, module.pointwise_conv1, module.config.channels
        rows = slice(half * size, (half + 1) * size)
        with g.scope("pointwise_conv1", ("linear", "gate")[half]):
            shape = (layer.in_channels, size)
            y = g.op("MatMul", x, parameter(g, "weight", shape, lambda: layer.weight[rows, :, 0].T))
            if layer.bias is None:
                return y
            bias = layer.bias
            return g.op("Add", y, parameter(g, "bias", (size,), lambda: bias[rows]))

    def _with_history(self, y: ir.Value, module: ConvolutionModule, index: int) -> ir.Value:
        """Put the kernel-1 frames before the chunk in front of it [batch, time, channels]."""
        g, config = self.g, module.config
        past = config.kernel - 1
        if past == 0:
            return y
        if self.streaming:
            history = g.op("Gather", self.histories, index, axis=0)
        else:
            start = g.op("Gather", self.initial_cache, index, axis=0)
            batch = g.op("Shape", y, start=0, end=1)
            history = g.op("Expand", start, g.op("Concat", batch, [past, config.channels], axis=0))
        y = g.op("Concat", history, y, axis=1)
        if self.streaming:
            self.next_cnn.append(g.op("Unsqueeze", g.op("Slice", y, [-past], [END], [1]), [0]))
        return y

    def _depthwise(self, y: ir.Value, module: ConvolutionModule) -> ir.Value:
        """The depthwise convolution and its normalisation, [batch, time, channels] to the same.

        Built as a 2-d convolution between two transpositions of four axes: onnxruntime has no fast 1-d convolution and
        merges the transpositions into its own change of layout.
        """
        g, config = self.g, module.config
        padding = 0 if config.causal else (config.kernel - 1) // 2
        layer, norm = module.depthwise_conv, module.norm
        folded = isinstance(norm, torch.nn.BatchNorm1d)

        def weight() -> torch.Tensor:
            scale = scale_and_shift(norm)[0] if isinstance(norm, torch.nn.BatchNorm1d) else 1.0
            return (layer.weight.double().permute(1, 2, 0) * scale).permute(2, 0, 1).unsqueeze(2)

        def bias() -> torch.Tensor:
            own = torch.zeros(config.channels) if layer.bias is None else layer.bias
            scale, shift = scale_and_shift(norm) if isinstance(norm, torch.nn.BatchNorm1d) else (1.0, 0.0)
            return own.double() * scale + shift

        with g.scope("depthwise_conv", group="depthwise_convolutions"):
            parameters = [parameter(g, "weight", (config.channels, 1, 1, config.kernel), weight)]
            if folded or layer.bias is not None:
                parameters.append(parameter(g, "bias", (config.channels,), bias))
            y = g.op(
                "Conv",
                g.op("Transpose", g.op("Unsqueeze", y, [1]), perm=[0, 3, 1, 2]),
                *parameters,
                group=config.channels,
                kernel_shape=[1, config.kernel],
                pads=[0, padding, 0, padding],
            )
            y = g.op("Squeeze", g.op("Transpose", y, perm=[0, 2, 3, 1]), [1])
        return y if folded else normalization(g, y, norm, "norm")


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
