"""The part of a convolution module between its projections, as a model-local function, with and without a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, build_function
from u2moe.runtime.graph.layers import layer_normalization

Around = Literal["cached", "causal", "centred"]
"""What a convolution sees beside a frame: those before it, cached in a stream, or as many after it as before."""


@dataclass(frozen=True, kw_only=True)
class OverTime(ABC):
    """A depthwise convolution over time and what belongs to it.

    Attributes:
        kernel: frames that the convolution sees.
    """

    NAME: ClassVar[str]
    INPUTS: ClassVar[tuple[str, ...]]
    kernel: int

    @abstractmethod
    def parameters(self) -> list[str]:
        """Names of its weights."""

    @abstractmethod
    def convolved(
        self, g: GraphBuilder, seen: ir.Value, channels: int, parameters: list[ir.Value], padding: int
    ) -> ir.Value:
        """From the convolution on."""

    def combined(self, g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:  # noqa: ARG002 - one input is as it is
        """What the convolution reads [batch, time, channels]."""
        return inputs[0]

    def attributes(self) -> dict[str, int | float | str]:
        """Of the function's calls, but for `causal`."""
        return {name: int(value) if isinstance(value, bool) else value for name, value in asdict(self).items()}

    def function(self, around: Around, channels: int) -> ir.Function:
        """The function of `INPUTS` [batch, time, channels], of what is around them, and of weights, to the same shape.

        Around them: `cached` has `cache` [blocks, batch, kernel - 1, channels], `block` (), and the further output
        `kept` [1, batch, kernel - 1, channels], the last frames that are seen, as they are cached. `causal` has
        both inputs, too, unless the kernel is 1, but its `cache` [blocks, 1, 1, channels] is the frame that stands for
        all before the first one. `centred` has `valid` [batch, time, 1], 1 for frames that exist and 0 for padding,
        which must look like the end of the audio.
        """
        past, own = self.kernel - 1, len(self.INPUTS)
        others = ["valid"] if around == "centred" else ["cache", "block"] if past or around == "cached" else []

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
            beside, parameters = inputs[own : own + len(others)], inputs[own + len(others) :]
            before = [g.op("Gather", *beside, axis=0)] if around == "cached" else []
            seen = self.combined(g, inputs[:own])
            if around == "centred":
                seen = g.op("Mul", seen, *beside)
                return [self.convolved(g, seen, channels, parameters, past // 2)]
            if around == "causal" and past:
                start = g.op("Gather", *beside, axis=0)
                shape = g.op("Concat", g.op("Shape", seen, start=0, end=1), [past, channels], axis=0)
                before = [g.op("Expand", start, shape)]
            seen = g.op("Concat", *before, seen, axis=1) if before else seen
            kept = []
            if around == "cached":
                kept = [g.op("Unsqueeze", g.op("Slice", seen, [-past], [END], [1]), [0])]
            return [self.convolved(g, seen, channels, parameters, 0), *kept]

        attributes = self.attributes() | ({} if around == "cached" else {"causal": int(around == "causal")})
        name = f"Cached{self.NAME}" if around == "cached" else self.NAME
        return build_function(name, [*self.INPUTS, *others, *self.parameters()], body, attributes)


@dataclass(frozen=True, kw_only=True)
class TimeConvolution(OverTime):
    """A gated linear unit, a depthwise convolution over time, a normalisation and an activation.

    Weights: `weight` [channels, 1, 1, kernel], with a bias `bias` [channels], with a normalisation `norm_weight` and
    `norm_bias` [channels].

    Attributes:
        activation: one of `ACTIVATIONS`; "": none.
        bias: whether the convolution has a bias.
        norm: whether a layer normalisation follows; `epsilon`: of it.
    """

    NAME: ClassVar[str] = "Convolution"
    INPUTS: ClassVar[tuple[str, ...]] = ("linear", "gate")
    activation: str
    bias: bool
    norm: bool
    epsilon: float

    def parameters(self) -> list[str]:
        """See `OverTime`."""
        return ["weight", *(["bias"] if self.bias else []), *(["norm_weight", "norm_bias"] if self.norm else [])]

    def combined(self, g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        """See `OverTime`."""
        linear, gate = inputs
        return g.op("Mul", linear, g.op("Sigmoid", gate))

    def convolved(
        self, g: GraphBuilder, seen: ir.Value, channels: int, parameters: list[ir.Value], padding: int
    ) -> ir.Value:
        """See `OverTime`."""
        y = depthwise(g, seen, channels, self.kernel, parameters[: 1 + self.bias], padding)
        if self.norm:
            y = layer_normalization(g, [y, *parameters[1 + self.bias :]], self.epsilon)
        return activation(g, y, self.activation) if self.activation else y


@dataclass(frozen=True, kw_only=True)
class DepthwiseConvolution(OverTime):
    """A depthwise convolution over time with `weight` [channels, 1, 1, kernel] and `bias` [channels], alone."""

    NAME: ClassVar[str] = "DepthwiseConvolution"
    INPUTS: ClassVar[tuple[str, ...]] = ("x",)

    def parameters(self) -> list[str]:
        """See `OverTime`."""
        return ["weight", "bias"]

    def convolved(
        self, g: GraphBuilder, seen: ir.Value, channels: int, parameters: list[ir.Value], padding: int
    ) -> ir.Value:
        """See `OverTime`."""
        return depthwise(g, seen, channels, self.kernel, parameters, padding)


@dataclass(frozen=True, kw_only=True)
class ReducingConvolution:
    """A depthwise convolution over time with a bias that leaves one of several frames.

    Attributes:
        kernel: frames that it sees; `stride`: from one to the next.
        before: zeros before the first frame; `after`: after the last.
    """

    kernel: int
    stride: int
    before: int
    after: int

    def function(self, channels: int) -> ir.Function:
        """The function of `x` [batch, time, channels], `valid` [batch, time, 1], `weight` and `bias`.

        Frames that do not exist (`valid` 0) look like the end. `weight` is [channels, 1, 1, kernel].
        """

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            x, valid, *taps = inputs
            image = g.op("Transpose", g.op("Unsqueeze", g.op("Mul", x, valid), [1]), perm=[0, 3, 1, 2])
            pads, kernel = [0, self.before, 0, self.after], [1, self.kernel]
            y = g.op("Conv", image, *taps, group=channels, kernel_shape=kernel, pads=pads, strides=[1, self.stride])
            return g.op("Squeeze", g.op("Transpose", y, perm=[0, 2, 3, 1]), [1])

        return build_function("ReducingConvolution", ["x", "valid", "weight", "bias"], body, asdict(self))


def depthwise(
    g: GraphBuilder, seen: ir.Value, channels: int, kernel: int, taps: Sequence[ir.Value], padding: int = 0
) -> ir.Value:
    """A depthwise convolution over [batch, time, channels] as nodes; `taps` are its weight and perhaps a bias.

    Built as a 2-d convolution between two transpositions of four axes: onnxruntime has no fast 1-d convolution and
    merges the transpositions into its own change of layout.
    """
    image, pads = g.op("Transpose", g.op("Unsqueeze", seen, [1]), perm=[0, 3, 1, 2]), [0, padding, 0, padding]
    y = g.op("Conv", image, *taps, group=channels, kernel_shape=[1, kernel], pads=pads)
    return g.op("Squeeze", g.op("Transpose", y, perm=[0, 2, 3, 1]), [1])
