"""The convolutions that reduce the frame rate before the blocks: in plain torch, and as one layer of the graph."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import onnx_ir as ir
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.layers import transposed, vector
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.builder import GraphBuilder


class Subsampling(nn.Module):
    """Convolutions over time and mel that reduce the frame rate by `subsampling_rate`, and a projection to `dim`."""

    LAYERS: ClassVar = {"conv2d": ((3, 2), (3, 2)), "conv2d6": ((3, 2), (5, 3)), "conv2d8": ((3, 2), (3, 2), (3, 2))}
    """(kernel, stride) of each convolution."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.input_size = config.input_size
        self.layers = self.LAYERS[config.subsampling]
        modules: list[nn.Module] = []
        for kernel, stride in self.layers:
            modules += [nn.Conv2d(config.dim if modules else 1, config.dim, kernel, stride), nn.ReLU()]
        self.conv = nn.Sequential(*modules)
        projection = nn.Linear(config.dim * self.output_length(config.input_size), config.dim)
        old_name = config.subsampling == "conv2d"
        self.out = nn.Sequential(projection) if old_name else None
        self.linear = None if old_name else projection
        self.scale = math.sqrt(config.dim)

    def output_length(self, length: int) -> int:
        """Frames (or mel bins) left from `length`; 0 if that is shorter than the window."""
        for kernel, stride in self.layers:
            length = (length - kernel) // stride + 1
        return max(length, 0)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """`output_length` of each element."""
        for kernel, stride in self.layers:
            lengths = (lengths - kernel) // stride + 1
        return lengths.clamp(min=0)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, frames, mel] to [batch, time, dim], scaled by sqrt(dim)."""
        x = self.conv(x.unsqueeze(1)).transpose(1, 2).flatten(2)
        layer, _ = self.projection
        return cast("Tensor", layer(x)) * self.scale

    @property
    def projection(self) -> tuple[nn.Linear, str]:
        """The projection to `dim`, and what WeNet calls it."""
        if isinstance(self.out, nn.Sequential):
            return cast("nn.Linear", self.out[0]), "out.0"
        return cast("nn.Linear", self.linear), "linear"

    def nodes(self, g: GraphBuilder, features: ir.Value) -> ir.Value:
        """`forward` as a layer of the graph."""
        projection, name = self.projection
        kernels, strides = zip(*self.layers, strict=True)
        form = layers.SubsamplingLayer(kernels=kernels, strides=strides, bins=self.input_size)
        with g.scope("embed", group="subsampling"):
            weights = []
            for index in range(0, 2 * len(kernels), 2):
                layer = cast("nn.Conv2d", self.conv[index])
                weights.append(vector(g, f"conv.{index}.weight", layer.weight))
                weights.append(vector(g, f"conv.{index}.bias", cast("Tensor", layer.bias)))
            weights.append(transposed(g, f"{name}.weight", projection.weight))
            weights.append(vector(g, f"{name}.bias", projection.bias))
            (x,) = g.call(form.function(projection.in_features), features, *weights)
            return g.op("Mul", x, self.scale)

    def output_lengths_nodes(self, g: GraphBuilder, lengths: ir.Value) -> ir.Value:
        """`output_lengths` as nodes."""
        with g.scope("output_lens"):
            for kernel, stride in self.layers:
                # (n - kernel) // stride + 1, and 0 if there are too few; ONNX division truncates towards zero
                lengths = g.op("Div", g.op("Max", g.op("Sub", lengths, kernel - stride), 0), stride)
        return lengths
