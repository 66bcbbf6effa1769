"""Convolution modules as model-local functions, with and without a cache. Projections are not included."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, build_function
from u2moe.runtime.graph.layers import layer_normalization

Values = list[ir.Value]
Around = Literal["cached", "causal", "centred"]
"""Context of a convolution. "cached": earlier frames, including those in a stream's cache. "causal": earlier frames of
the input. "centred": earlier and later frames of the input."""


@dataclass(frozen=True, kw_only=True)
class DepthwiseConvolution:
    """A depthwise convolution over time, with `weight` [channels, 1, 1, kernel] and `bias` [channels]."""

    NAME: ClassVar[str] = "DepthwiseConvolution"
    INPUTS: ClassVar[tuple[str, ...]] = ("x",)
    kernel: int  # in frames

    def parameters(self) -> list[str]:
        """Return the names of the weights."""
        return ["weight", "bias"]

    def convolved(self, g: GraphBuilder, seen: ir.Value, channels: int, taps: Values, padding: int) -> ir.Value:
        """Add the convolution and any nodes after it. `taps` are the values of `parameters`. Return the output."""
        return _over_time(g, seen, channels, self.kernel, taps, [0, padding, 0, padding])

    def combined(self, g: GraphBuilder, inputs: Values) -> ir.Value:  # noqa: ARG002 - a single input needs no nodes
        """Return the convolution's input [batch, time, channels], made from the layer's `inputs`."""
        return inputs[0]

    def attributes(self) -> dict[str, int | float | str]:
        """Return the attributes of calls to the function, except `causal`."""
        return {name: int(value) if isinstance(value, bool) else value for name, value in asdict(self).items()}

    def function(self, around: Around, channels: int) -> ir.Function:
        """Build the layer's function for a context. Its output and each of `INPUTS` are [batch, time, channels].

        The function's inputs are `INPUTS`, the inputs for the context, and the weights. Inputs for each context:

        - `cached`: `cache` [blocks, batch, kernel - 1, channels] and `block` (). The function also returns `kept`
          [1, batch, kernel - 1, channels], the last frames for the cache.
        - `causal`: `cache` and `block`, or neither if the kernel is 1. Here, `cache` [blocks, 1, 1, channels] contains
          the frame that stands for all frames before the first.
        - `centred`: `valid` [batch, time, 1], 1 for real frames and 0 for padding. Padding is treated as the end of the
          audio.
        """
        past, own = self.kernel - 1, len(self.INPUTS)
        others = ["valid"] if around == "centred" else ["cache", "block"] if past or around == "cached" else []

        def body(g: GraphBuilder, inputs: Values) -> Values:
            beside, parameters = inputs[own : own + len(others)], inputs[own + len(others) :]
            before = [g.op("Gather", *beside, axis=0)] if around == "cached" else []
            seen = self.combined(g, inputs[:own])
            if around == "centred":
                return [self.convolved(g, g.op("Mul", seen, *beside), channels, parameters, past // 2)]
            if around == "causal" and past:
                start = g.op("Gather", *beside, axis=0)
                shape = g.op("Concat", g.op("Shape", seen, start=0, end=1), [past, channels], axis=0)
                before = [g.op("Expand", start, shape)]
            seen = g.op("Concat", *before, seen, axis=1) if before else seen
            kept = [g.op("Unsqueeze", g.op("Slice", seen, [-past], [END], [1]), [0])] if around == "cached" else []
            return [self.convolved(g, seen, channels, parameters, 0), *kept]

        attributes = self.attributes() | ({} if around == "cached" else {"causal": int(around == "causal")})
        name = f"Cached{self.NAME}" if around == "cached" else self.NAME
        return build_function(name, [*self.INPUTS, *others, *self.parameters()], body, attributes)


@dataclass(frozen=True, kw_only=True)
class TimeConvolution(DepthwiseConvolution):
    """A gated linear unit, a depthwise convolution over time, and optionally a normalisation and an activation.

    The weights are those of `DepthwiseConvolution`, with or without a bias, and `norm_weight` and `norm_bias`
    [channels] if a layer normalisation follows.
    """

    NAME: ClassVar[str] = "Convolution"
    INPUTS: ClassVar[tuple[str, ...]] = ("linear", "gate")
    activation: str  # one of `ACTIVATIONS`; "": none
    bias: bool
    norm: bool
    epsilon: float  # of the normalisation

    def parameters(self) -> list[str]:
        """Return the names of the weights."""
        return ["weight", *["bias"] * self.bias, *["norm_weight", "norm_bias"] * self.norm]

    def combined(self, g: GraphBuilder, inputs: Values) -> ir.Value:
        """Return the gated linear unit."""
        linear, gate = inputs
        return g.op("Mul", linear, g.op("Sigmoid", gate))

    def convolved(self, g: GraphBuilder, seen: ir.Value, channels: int, taps: Values, padding: int) -> ir.Value:
        """See `DepthwiseConvolution`."""
        y = super().convolved(g, seen, channels, taps[: 1 + self.bias], padding)
        if self.norm:
            y = layer_normalization(g, [y, *taps[1 + self.bias :]], self.epsilon)
        return activation(g, y, self.activation) if self.activation else y


@dataclass(frozen=True, kw_only=True)
class ReducingConvolution:
    """A strided depthwise convolution over time with a bias, which reduces the frame rate."""

    kernel: int  # in frames
    stride: int  # in frames
    before: int  # number of zeros before the first frame
    after: int  # number of zeros after the last frame

    def function(self, channels: int) -> ir.Function:
        """Build the convolution of `x` [batch, time, channels], with the further inputs `valid`, `weight` and `bias`.

        `valid` [batch, time, 1] is 0 for frames of padding, which count as zeros. `weight` is [channels, 1, 1, kernel].
        """

        def body(g: GraphBuilder, inputs: Values) -> ir.Value:
            x, valid, *taps = inputs
            pads = [0, self.before, 0, self.after]
            return _over_time(g, g.op("Mul", x, valid), channels, self.kernel, taps, pads, strides=[1, self.stride])

        return build_function("ReducingConvolution", ["x", "valid", "weight", "bias"], body, asdict(self))


def _over_time(
    g: GraphBuilder, x: ir.Value, channels: int, kernel: int, taps: Values, pads: list[int], **strides: Any
) -> ir.Value:
    """Convolve x [batch, time, channels] as an image; `taps` are a weight and optionally a bias."""
    # onnxruntime has no fast 1-D convolution but merges the two transpositions of four axes into its layout changes.
    image = g.op("Transpose", g.op("Unsqueeze", x, [1]), perm=[0, 3, 1, 2])
    y = g.op("Conv", image, *taps, group=channels, kernel_shape=[1, kernel], pads=pads, **strides)
    return g.op("Squeeze", g.op("Transpose", y, perm=[0, 2, 3, 1]), [1])
