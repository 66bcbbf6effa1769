"""Convolutions over time, in plain torch and as layers of the graph."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import Convolution
from u2moe.export.attention import RMSNorm, norm
from u2moe.export.layers import Values, half, linear, normalization, parameter, vector, weight_and_bias
from u2moe.export.moe import activation
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.convolution import Around, DepthwiseConvolution, TimeConvolution

HALVES = ("linear", "gate")  # names of the halves of the gated linear unit


class ConvolutionModule(nn.Module):
    """Pointwise convolution, gated linear unit, depthwise convolution, pointwise convolution (arXiv 2005.08100)."""

    def __init__(self, dim: int, config: Convolution, stride: int = 1) -> None:
        super().__init__()
        self.config, self.stride = config, stride
        size, kernel, bias = config.channels, config.kernel, config.bias
        padding = 0 if config.causal else (kernel - 1) // 2
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * size, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(size, size, kernel, stride, padding, groups=size, bias=bias)
        self.norm = norm(size, config.norm)
        self.pointwise_conv2 = nn.Conv1d(size, dim, 1, bias=bias)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, valid: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convolve `x` [batch, time, dim]; if causal, also return the cache for the next call.

        `valid` [batch, time] is true for frames that exist. `cache` [batch, channels, kernel-1] contains the frames
        before `x`. It is None at the start of an utterance, or if the convolution is not causal. The output has one
        frame for every `stride` frames of `x`.
        """
        gated = nn.functional.glu(self.pointwise_conv1(x.masked_fill(~valid.unsqueeze(-1), 0.0).transpose(1, 2)), dim=1)
        if self.config.causal:
            if cache is None:  # the gated linear unit's output for zeros
                bias, channels = self.pointwise_conv1.bias, self.config.channels
                zeros = torch.zeros(2 * channels) if bias is None else bias
                start = nn.functional.glu(zeros.to(self.pointwise_conv1.weight), dim=0)
                cache = start.view(1, -1, 1).expand(len(x), -1, self.config.kernel - 1)
            gated = torch.cat((cache.to(gated.dtype), gated), dim=2)
            cache = gated[:, :, gated.shape[2] - self.config.kernel + 1 :]
        y = self.depthwise_conv(gated)
        over_channels = self.config.norm.kind != "batch_norm"
        y = self.norm(y.transpose(1, 2)).transpose(1, 2) if over_channels else self.norm(y)
        y = self.pointwise_conv2(self.activation(y)).transpose(1, 2)
        return y.masked_fill(~valid[:, :: self.stride].unsqueeze(-1), 0.0), cache


def initial_cache(g: GraphBuilder, modules: Sequence[ConvolutionModule]) -> ir.Value | None:
    """Return the initial history frame of each convolution [modules, 1, 1, channels]; None if they have no history."""
    if not modules or not modules[0].config.causal or modules[0].config.kernel == 1:
        return None
    shape = (len(modules), 1, 1, modules[0].config.channels)
    with g.scope(group="convolution_state"):
        return parameter(g, "initial_cache", shape, lambda: torch.stack(list(map(_before_first_frame, modules))))


@dataclass(frozen=True)
class Surroundings:
    """The frames around a convolution's input. All blocks share one instance for each kind of convolution."""

    histories: ir.Value | None
    """Frames before a chunk [blocks, batch, kernel - 1, channels]. For whole utterances, one frame that stands for all
    frames before the first [blocks, 1, 1, channels]. None: convolutions do not see earlier frames."""
    valid: (
        ir.Value | None
    )  # 1 for frames that exist, 0 for padding [batch, time, 1]; None if this call processes a chunk
    kept: list[ir.Value] = field(default_factory=list)  # to cache for the next call, one entry per block built so far

    def convolved(
        self,
        g: GraphBuilder,
        form: DepthwiseConvolution,
        inputs: Values,
        weights: Values,
        row: int,
        *,
        channels: int,
        causal: bool,
    ) -> ir.Value:
        """Convolve `inputs`, with block `row` of `histories`; return the output."""
        if not causal:
            beside, kind = [self.valid], "centred"
        else:
            beside = [] if self.histories is None else [self.histories, g.constant(row)]
            kind = "cached" if self.valid is None and beside else "causal"
        function = form.function(cast("Around", kind), channels)
        y, *kept = g.call(function, *inputs, *cast("list[ir.Value]", beside), *weights)
        self.kept.extend(kept)
        return y


class TimeDepthwise(nn.Conv1d):
    """A standalone depthwise convolution, either causal or centred on each frame."""

    def __init__(self, channels: int, kernel: int, *, causal: bool) -> None:
        super().__init__(channels, channels, kernel, padding=0 if causal else (kernel - 1) // 2, groups=channels)
        self.causal = causal

    def over(self, x: Tensor, valid: Tensor, history: Tensor) -> tuple[Tensor, Tensor | None]:
        """Convolve `x` [batch, time, channels]; if causal, also return the next call's `history`.

        `history` [batch or 1, channels, kernel-1] contains the frames before `x`. `valid` [batch, time] is true for
        frames that exist. A convolution that is not causal reads zeros for all other frames.
        """
        if not self.causal:
            return self(x.masked_fill(~valid.unsqueeze(-1), 0.0).transpose(1, 2)).transpose(1, 2), None
        seen = torch.cat((history.expand(len(x), -1, -1).to(x.dtype), x.transpose(1, 2)), dim=2)
        return self(seen).transpose(1, 2), seen[:, :, seen.shape[2] - self.kernel_size[0] + 1 :]

    def nodes(self, g: GraphBuilder, x: ir.Value, around: Surroundings, row: int, name: str) -> ir.Value:
        """Add a layer to the graph that computes `over` with block `row` of the histories; return its output."""
        channels, kernel = self.in_channels, self.kernel_size[0]
        with g.scope(name, group="depthwise_convolutions"):
            weight = parameter(g, "weight", (channels, 1, 1, kernel), lambda: self.weight.unsqueeze(2))
            weights, form = [weight, vector(g, "bias", cast("Tensor", self.bias))], DepthwiseConvolution(kernel=kernel)
            return around.convolved(g, form, [x], weights, row, channels=channels, causal=self.causal)


def convolution(g: GraphBuilder, x: ir.Value, module: ConvolutionModule, frames: Surroundings, row: int) -> ir.Value:
    """Return the module's output for x [batch, time, dim]; `row` is the block's row in the histories of `frames`."""
    config = module.config
    with g.scope("conv_module", group="pointwise_convolutions"):
        inputs = [half(g, x, module.pointwise_conv1, "pointwise_conv1", name) for name in HALVES]
        weights = _weights(g, module)
        is_rms, has_norm = isinstance(module.norm, RMSNorm), isinstance(module.norm, nn.LayerNorm)
        kind, epsilon = "" if is_rms else config.activation, config.norm.eps if has_norm else 0.0
        bias = len(weights) - 2 * has_norm > 1
        form = TimeConvolution(kernel=config.kernel, activation=kind, bias=bias, norm=has_norm, epsilon=epsilon)
        y = frames.convolved(g, form, inputs, weights, row, channels=config.channels, causal=config.causal)
        if is_rms:
            y = normalization(g, y, module.norm, "norm")
            y = g.call(layers.activation_layer(config.activation), y)[0]
        # padded frames may contain anything from here on: no valid frame depends on them
        return linear(g, y, module.pointwise_conv2, "pointwise_conv2")


def convolution_parts(
    g: GraphBuilder, x: ir.Value, module: ConvolutionModule
) -> tuple[ir.Value, list[ir.Value], Callable[[ir.Value], ir.Value]]:
    """Return a module's parts for `x` [batch, time, dim], without the depthwise convolution, which the caller adds.

    These are the convolution's input [batch, time, channels], its weight [channels, 1, 1, kernel] and bias [channels],
    and a function that applies the layers after it. The convolution must have a bias or batch norm.
    """
    with g.scope("conv_module", group="pointwise_convolutions"):
        value, gate = (half(g, x, module.pointwise_conv1, "pointwise_conv1", name) for name in HALVES)
        taps = _weights(g, module)[:2]

    def finish(y: ir.Value) -> ir.Value:
        with g.scope("conv_module", group="pointwise_convolutions"):
            y = normalization(g, y, module.norm, "norm") if isinstance(module.norm, nn.LayerNorm) else y
            y = g.call(layers.activation_layer(module.config.activation), y)[0]
            return linear(g, y, module.pointwise_conv2, "pointwise_conv2")

    return g.op("Mul", value, g.op("Sigmoid", gate)), taps, finish


def _weights(g: GraphBuilder, module: ConvolutionModule) -> list[ir.Value]:
    """Return the depthwise convolution's weights, with any batch norm folded in, and the weights of any layer norm."""
    config, layer, norm = module.config, module.depthwise_conv, module.norm
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    if isinstance(norm, nn.BatchNorm1d):
        variance, mean = cast("Tensor", norm.running_var), cast("Tensor", norm.running_mean)
        scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
        shift = norm.bias.double() - mean.double() * scale

    def weight() -> Tensor:
        return (layer.weight.double().permute(1, 2, 0) * scale).permute(2, 0, 1).unsqueeze(2)

    def bias() -> Tensor:
        own = torch.zeros(config.channels) if layer.bias is None else layer.bias
        return own.double() * scale + shift

    with g.scope("depthwise_conv", group="depthwise_convolutions"):
        weights = [parameter(g, "weight", (config.channels, 1, 1, config.kernel), weight)]
        if isinstance(norm, nn.BatchNorm1d) or layer.bias is not None:
            weights.append(parameter(g, "bias", (config.channels,), bias))
    if isinstance(norm, nn.LayerNorm):
        with g.scope("norm", group="normalization"):
            weights += weight_and_bias(g, norm)
    return weights


def _before_first_frame(module: ConvolutionModule) -> Tensor:
    """Return the frame [1, 1, channels] that one convolution sees before the first frame."""
    # float64, then rounded, because the last bit of torch's sigmoid depends on the processor
    bias, channels = module.pointwise_conv1.bias, module.config.channels
    if bias is None:
        return torch.zeros(1, 1, channels)
    values, gates = bias.double().chunk(2)
    divisors = [1 + math.exp(min(-gate, 700.0)) for gate in gates.tolist()]
    return (values / torch.tensor(divisors, dtype=torch.float64)).float().view(1, 1, channels)
