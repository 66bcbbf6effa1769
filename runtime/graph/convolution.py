"""The part of a convolution module between its projections, as a model-local function, with and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import onnx_ir as ir

from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, build_function
from u2moe.runtime.graph.layers import layer_normalization


@dataclass(frozen=True, kw_only=True)
class TimeConvolution:
    """A gated linear unit, a depthwise convolution over time, a normalisation and an activation.

    Attributes:
        kernel: frames that the convolution sees.
        activation: one of `ACTIVATIONS`; "": none.
        bias: whether the convolution has a bias.
        norm: whether a layer normalisation follows; `epsilon`: of it.
    """

    kernel: int
    activation: str
    bias: bool
    norm: bool
    epsilon: float

    def attributes(self) -> dict[str, int | float | str]:
        """Of the function's calls."""
        return {**asdict(self), "bias": int(self.bias), "norm": int(self.norm)}

    def cached(self, channels: int) -> ir.Function:
        """The function for a chunk, whose convolution sees the frames before it.

        Inputs: `linear` and `gate` [batch, time, channels], `cache` [blocks, batch, kernel - 1, channels], `block` (),
        `weight` [channels, 1, 1, kernel], with a bias `bias` [channels], with a normalisation `norm_weight` and
        `norm_bias` [channels]. Outputs: `y` [batch, time, channels]; `kept` [1, batch, kernel - 1, channels], the last
        frames that the convolution sees, as they are cached.
        """

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
            linear, gate, cache, block, *parameters = inputs
            seen = g.op("Concat", g.op("Gather", cache, block, axis=0), _gated(g, linear, gate), axis=1)
            kept = g.op("Unsqueeze", g.op("Slice", seen, [1 - self.kernel], [END], [1]), [0])
            return [self._convolved(g, seen, channels, parameters), kept]

        names = ["linear", "gate", "cache", "block", *self._parameters()]
        return build_function("CachedConvolution", names, body, self.attributes())

    def causal(self, channels: int) -> ir.Function:
        """The function for a whole utterance, whose convolution sees each frame and those before it.

        Inputs as of `cached`, but `cache` [blocks, 1, 1, channels] is the frame that stands for all before the first
        one; a convolution of kernel 1 has neither this input nor `block`.
        """
        past = self.kernel - 1

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            linear, gate, *others = inputs
            seen = _gated(g, linear, gate)
            if past:
                start = g.op("Gather", others[0], others[1], axis=0)
                shape = g.op("Concat", g.op("Shape", seen, start=0, end=1), [past, channels], axis=0)
                seen = g.op("Concat", g.op("Expand", start, shape), seen, axis=1)
            return self._convolved(g, seen, channels, others[2:] if past else others)

        names = ["linear", "gate", *(["cache", "block"] if past else []), *self._parameters()]
        return build_function("Convolution", names, body, {**self.attributes(), "causal": 1})

    def centred(self, channels: int) -> ir.Function:
        """The function for a whole utterance, whose convolution sees as many frames after each as before.

        Input 2 is `valid` [batch, time, 1], 1 for frames that exist and 0 for padding, which must look like the end of
        the audio: WeNet zeroes it before the unit, leaving only the bias.
        """

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            linear, gate, valid, *parameters = inputs
            seen = g.op("Mul", _gated(g, linear, gate), valid)
            return self._convolved(g, seen, channels, parameters, (self.kernel - 1) // 2)

        names = ["linear", "gate", "valid", *self._parameters()]
        return build_function("Convolution", names, body, {**self.attributes(), "causal": 0})

    def _parameters(self) -> list[str]:
        return ["weight", *(["bias"] if self.bias else []), *(["norm_weight", "norm_bias"] if self.norm else [])]

    def _convolved(
        self, g: GraphBuilder, seen: ir.Value, channels: int, parameters: list[ir.Value], padding: int = 0
    ) -> ir.Value:
        """From the convolution on."""
        taps, norms = parameters[: 1 + self.bias], parameters[1 + self.bias :]
        y = depthwise(g, seen, channels, self.kernel, taps, padding)
        if self.norm:
            y = layer_normalization(g, [y, *norms], self.epsilon)
        return activation(g, y, self.activation) if self.activation else y


@dataclass(frozen=True, kw_only=True)
class DepthwiseConvolution:
    """A depthwise convolution over time with a bias, alone.

    Attributes:
        kernel: frames that it sees.
    """

    kernel: int

    def cached(self, channels: int) -> ir.Function:
        """The function for a chunk.

        Inputs: `x` [batch, time, channels], `cache` [blocks, batch, kernel - 1, channels], `block` (), `weight`
        [channels, 1, 1, kernel], `bias` [channels]. Outputs: `y` [batch, time, channels]; `kept` [1, batch, kernel - 1,
        channels], the last frames, as they are cached.
        """

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
            x, cache, block, *parameters = inputs
            seen = g.op("Concat", g.op("Gather", cache, block, axis=0), x, axis=1)
            kept = g.op("Unsqueeze", g.op("Slice", seen, [1 - self.kernel], [END], [1]), [0])
            return [depthwise(g, seen, channels, self.kernel, parameters), kept]

        names = ["x", "cache", "block", "weight", "bias"]
        return build_function("CachedDepthwiseConvolution", names, body, asdict(self))

    def causal(self, channels: int) -> ir.Function:
        """The function for a whole utterance: `cache` [blocks, 1, 1, channels] stands for all frames before the first.

        With kernel 1 there is neither this input nor `block`.
        """
        past = self.kernel - 1

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            seen, *others = inputs
            if past:
                start = g.op("Gather", others[0], others[1], axis=0)
                shape = g.op("Concat", g.op("Shape", seen, start=0, end=1), [past, channels], axis=0)
                seen = g.op("Concat", g.op("Expand", start, shape), seen, axis=1)
            return depthwise(g, seen, channels, self.kernel, others[2 if past else 0 :])

        names = ["x", *(["cache", "block"] if past else []), "weight", "bias"]
        return build_function("DepthwiseConvolution", names, body, {**asdict(self), "causal": 1})

    def centred(self, channels: int) -> ir.Function:
        """The function for a whole utterance and as many frames after each as before.

        Input 1 is `valid` [batch, time, 1], 1 for frames that exist and 0 for padding, which must look like the end.
        """

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            x, valid, *parameters = inputs
            return depthwise(g, g.op("Mul", x, valid), channels, self.kernel, parameters, (self.kernel - 1) // 2)

        return build_function(
            "DepthwiseConvolution", ["x", "valid", "weight", "bias"], body, {**asdict(self), "causal": 0}
        )


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


def _gated(g: GraphBuilder, linear: ir.Value, gate: ir.Value) -> ir.Value:
    return g.op("Mul", linear, g.op("Sigmoid", gate))
