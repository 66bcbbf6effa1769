"""Subsampling reduces the frame rate before the blocks. It is implemented in plain torch and as layers of the graph."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture, SubsamplingKind
from u2moe.export.layers import affine, linear, normalization, parameter, product, vector
from u2moe.export.positions import LearnedPositions
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.builder import GraphBuilder


class Subsampling(nn.Module):
    """Maps features to the blocks' input, scaled by the factor that WeNet's positional encoding modules apply."""

    POSITIONS = "pos_enc"  # WeNet's name for the module with positional encodings

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.input_size = config.input_size
        self.rate = config.subsampling_rate // config.frame_reduction
        self.window = config.right_context + 1
        self.scale = math.sqrt(config.dim) if config.positions in ("rel_pos", "abs_pos", "rope_pos") else 1.0
        if config.learned_positions:
            self.add_module(self.POSITIONS, LearnedPositions(config.dim))

    @property
    def learned(self) -> LearnedPositions | None:
        """The learned positional encodings, or None if there are none."""
        return cast("LearnedPositions | None", getattr(self, self.POSITIONS, None))

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the numbers of encoder frames for numbers of feature frames; 0 if these do not fill a window."""
        return (lengths - self.window + self.rate).clamp(min=0) // self.rate

    def output_lengths_nodes(self, g: GraphBuilder, lengths: ir.Value) -> ir.Value:
        """Return `output_lengths` as nodes."""
        with g.scope("output_lens"):
            return g.op("Div", g.op("Max", g.op("Sub", lengths, self.window - self.rate), 0), self.rate)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map [batch, frames, bins] to [batch, time, dim]; `lengths` [batch] are the numbers of valid frames."""
        return cast("Tensor", self._reduced(x, lengths)) * self.scale

    def nodes(self, g: GraphBuilder, features: ir.Value, lens: ir.Value) -> ir.Value:
        """Add the layers that compute `forward` to the graph, and return their output."""
        with g.scope("embed", group="subsampling"):
            x = self._reduced_nodes(g, features, lens)
            return x if self.scale == 1 else g.op("Mul", x, self.scale)

    def _reduced(self, x: Tensor, lengths: Tensor) -> Any:
        """Return the output of `forward` before it is scaled."""
        raise NotImplementedError

    def _reduced_nodes(self, g: GraphBuilder, features: ir.Value, lens: ir.Value) -> ir.Value:
        """Return `_reduced` as nodes."""
        raise NotImplementedError


class Convolutions(Subsampling):
    """Convolutions over time and mel, and a projection to `dim`."""

    LAYERS: ClassVar[dict[SubsamplingKind, tuple[tuple[int, int], ...]]] = {
        "conv2d": ((3, 2), (3, 2)),
        "conv2d2": ((3, 2),),
        "conv2d6": ((3, 2), (5, 3)),
        "conv2d8": ((3, 2), (3, 2), (3, 2)),
    }
    """(kernel, stride) of each convolution."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__(config)
        self.layers = self.LAYERS[config.subsampling]
        modules: list[nn.Module] = []
        for kernel, stride in self.layers:
            modules += [nn.Conv2d(config.dim if modules else 1, config.dim, kernel, stride), nn.ReLU()]
        self.conv = nn.Sequential(*modules)
        # the convolutions reduce the number of bins in the same way as the number of frames
        bins = (config.input_size - self.window + self.rate) // self.rate
        projection = nn.Linear(config.dim * bins, config.dim)
        old_name = config.subsampling in ("conv2d", "conv2d2")
        self.out = nn.Sequential(projection) if old_name else None
        self.linear = None if old_name else projection

    def _reduced(self, x: Tensor, lengths: Tensor) -> Any:  # noqa: ARG002 - no frame depends on padding
        return self.projection[0](self.conv(x.unsqueeze(1)).transpose(1, 2).flatten(2))

    @property
    def projection(self) -> tuple[nn.Linear, str]:
        """The projection to `dim`, and WeNet's name for it."""
        if isinstance(self.out, nn.Sequential):
            return cast("nn.Linear", self.out[0]), "out.0"
        return cast("nn.Linear", self.linear), "linear"

    def output_lengths_nodes(self, g: GraphBuilder, lengths: ir.Value) -> ir.Value:
        """See `Subsampling`. Applies the length formula of each convolution in turn, as the demo model does."""
        with g.scope("output_lens"):
            for kernel, stride in self.layers:
                lengths = g.op("Div", g.op("Max", g.op("Sub", lengths, kernel - stride), 0), stride)
        return lengths

    def _reduced_nodes(self, g: GraphBuilder, features: ir.Value, lens: ir.Value) -> ir.Value:  # noqa: ARG002 - as above
        projection, name = self.projection
        kernels, strides = zip(*self.layers, strict=True)
        form = layers.SubsamplingLayer(kernels=kernels, strides=strides, bins=self.input_size)
        weights = self._weights(g)
        if len(kernels) == 1:  # the projection is as large as other linear layers, so it is quantized like them
            (x,) = g.call(form.convolutions(projection.in_features), features, *weights)
            return linear(g, x, projection, name)
        return g.call(form.function(projection.in_features), features, *weights, *affine(g, projection, f"{name}."))[0]

    def _weights(self, g: GraphBuilder) -> list[ir.Value]:
        """Add the convolutions' weights and biases, except channels that the next one multiplies only by zeros."""
        # The demo model has such zeros: it was trained with a quarter of the channels that WeNet's format stores.
        values = list[ir.Value]()
        inputs: slice | Tensor = slice(None)
        convolutions = cast("Sequence[nn.Conv2d]", self.conv[::2])
        for index, (layer, following) in enumerate(zip(convolutions, [*convolutions[1:], None], strict=True)):
            kept = _used_inputs(following)
            values.append(vector(g, f"conv.{2 * index}.weight", layer.weight[kept][:, inputs]))
            values.append(vector(g, f"conv.{2 * index}.bias", cast("Tensor", layer.bias)[kept]))
            inputs = kept
        return values


def _used_inputs(layer: nn.Conv2d | None) -> slice | Tensor:
    """Return the input channels that have weights other than zero: all as a slice, some as indices."""
    used = torch.ones(1, dtype=torch.bool) if layer is None else layer.weight.detach().ne(0).any(0).flatten(1).any(1)
    return slice(None) if used.all() or not used.any() else used.nonzero()[:, 0]


class Projection(Subsampling):
    """A projection and a layer normalisation of each frame; the frame rate does not change."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__(config)
        norm = nn.LayerNorm(config.dim, eps=config.embed_eps)
        self.out = nn.Sequential(nn.Linear(config.input_size, config.dim), norm)

    def _reduced(self, x: Tensor, lengths: Tensor) -> Any:  # noqa: ARG002 - frames are independent
        return self.out(x)

    def _reduced_nodes(self, g: GraphBuilder, features: ir.Value, lens: ir.Value) -> ir.Value:  # noqa: ARG002 - as above
        return normalization(g, linear(g, features, cast("nn.Linear", self.out[0]), "out.0"), self.out[1], "out.1")


class StackedFrames(Subsampling):
    """Stacked pairs of frames, normalised and projected. Here, WeNet does not scale the input of the blocks."""

    POSITIONS = "pos_enc_class"

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__(config)
        size, self.scale = self.rate * config.input_size, 1.0
        self.norm = nn.LayerNorm(size, eps=config.embed_eps)
        self.out = nn.Linear(size, config.dim)

    def _reduced(self, x: Tensor, lengths: Tensor) -> Any:  # noqa: ARG002 - no frame depends on padding
        time = x.shape[1] // self.rate
        return self.out(self.norm(x[:, : time * self.rate].reshape(len(x), time, -1)))

    def _reduced_nodes(self, g: GraphBuilder, features: ir.Value, lens: ir.Value) -> ir.Value:  # noqa: ARG002 - as above
        (x,) = g.call(layers.stacked_frames(self.rate, self.input_size), features)
        return linear(g, normalization(g, x, self.norm, "norm"), self.out, "out")


class TimeConvolutions(Subsampling):
    """Whisper's convolutions over time, which see zeros beyond both ends of an utterance."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__(config)
        first = nn.Conv1d(config.input_size, config.dim, 3, padding=1)
        second = nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1)
        self.conv = nn.Sequential(first, nn.GELU(), second, nn.GELU())

    def _reduced(self, x: Tensor, lengths: Tensor) -> Any:
        valid = (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)).unsqueeze(1)
        return self.conv[2:](self.conv[:2](x.transpose(1, 2) * valid) * valid).transpose(1, 2)

    def _reduced_nodes(self, g: GraphBuilder, features: ir.Value, lens: ir.Value) -> ir.Value:
        frames = g.op("Range", 0, g.op("Squeeze", g.op("Shape", features, start=1, end=2), [0]), 1)
        valid = g.op("Cast", g.op("Less", frames, g.op("Unsqueeze", lens, [1])), to=ir.DataType.FLOAT)
        x, valid = features, g.op("Unsqueeze", valid, [2])
        for index in (0, 2):
            x = self._convolved(g, x, valid, index)
        return x

    def _convolved(self, g: GraphBuilder, x: ir.Value, valid: ir.Value, index: int) -> ir.Value:
        layer = cast("nn.Conv1d", self.conv[index])
        (windows,) = g.call(layers.time_windows(layer.stride[0]), x, valid)
        shape = (3 * layer.in_channels, layer.out_channels)
        with g.scope("conv", str(index)):
            weight = parameter(g, "weight", shape, lambda: layer.weight.permute(2, 1, 0).flatten(0, 1))
            y = product(g, windows, weight, vector(g, "bias", cast("Tensor", layer.bias)))
            return g.call(layers.activation_layer("gelu"), y)[0]


KINDS: dict[SubsamplingKind, type[Subsampling]] = {
    **dict.fromkeys(Convolutions.LAYERS, Convolutions),
    "linear": Projection,
    "stack_n_frames": StackedFrames,
    "conv1d2": TimeConvolutions,
}
"""The classes by WeNet's names. A new kind also needs its rate in `architecture.SUBSAMPLINGS`."""
