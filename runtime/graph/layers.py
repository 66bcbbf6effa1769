"""Float32 layers of the networks as model-local functions. Export calls these functions; quantize replaces them.

The weights of a layer are inputs of its call; the attributes describe the layer. See `builder.build_function`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir

from u2moe.runtime.bundle.functions import FUNCTIONS
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, build_function

T = TypeVar("T")
PLAIN_LAYERS = frozenset(name for name, function in FUNCTIONS.items() if function.exported) - {"MixtureOfExperts"}
"""Names of the float32 layers except for `dispatch.float_mixture`."""


def affine(g: GraphBuilder, x: ir.Value, parameters: Sequence[ir.Value]) -> ir.Value:
    """Add nodes for x @ weight + bias. `parameters` are the weight [in, out] and optionally the bias [out]."""
    weight, *biases = parameters
    y = g.op("MatMul", x, weight)
    return g.op("Add", y, biases[0]) if biases else y


def halves(parameters: list[T]) -> tuple[list[T], list[T]]:
    """Split the weights and biases of two products: return those of the first product, then those of the second."""
    return parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]


def linear(*, bias: bool) -> ir.Function:
    """Build the function y = x @ weight + bias for x [..., in]."""
    names = ["x", "weight", *["bias"] * bias]
    return build_function("Linear", names, lambda g, inputs: affine(g, inputs[0], inputs[1:]))


def feed_forward(kind: str, *, bias: bool, gated: bool = False) -> ir.Function:
    """Build y = kind(h) @ w2 + w2_bias, h = x @ w1 + w1_bias. Gated: kind(x @ gate) * h instead of kind(h)."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, parameters = inputs[0], inputs[1 + gated :]
        first, second = halves(parameters)
        hidden = activation(g, affine(g, x, inputs[1:2] if gated else first), kind)
        return affine(g, g.op("Mul", hidden, affine(g, x, first)) if gated else hidden, second)

    names = ["x", *["gate"] * gated, "w1", *["w1_bias"] * bias, "w2", *["w2_bias"] * bias]
    function = "GatedFeedForward" if gated else "FeedForward"
    return build_function(function, names, body, {"activation": kind, "bias": int(bias)})


def activation_layer(kind: str) -> ir.Function:
    """Build the function y = kind(x), for an activation that is not part of another layer."""
    return build_function("Activation", ["x"], lambda g, inputs: activation(g, inputs[0], kind), {"activation": kind})


def normalization(epsilon: float) -> ir.Function:
    """Build the layer normalisation of x [..., dim], with weight and bias [dim]."""
    names, attributes = ["x", "weight", "bias"], {"epsilon": epsilon}
    return build_function("Normalization", names, lambda g, x: layer_normalization(g, x, epsilon), attributes)


def add_normalization(epsilon: float) -> ir.Function:
    """Build a function of `x` and `branch`, both [..., dim], that returns their sum and the normalised sum."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
        x, branch, *parameters = inputs
        total = g.op("Add", x, branch)
        return [total, layer_normalization(g, [total, *parameters], epsilon)]

    return build_function("AddNormalization", ["x", "branch", "weight", "bias"], body, {"epsilon": epsilon})


def layer_normalization(g: GraphBuilder, inputs: Sequence[ir.Value], epsilon: float) -> ir.Value:
    """Add a layer normalisation over the last axis. `inputs` are x, weight and bias."""
    return g.op("LayerNormalization", *inputs, axis=-1, epsilon=epsilon)


def rms_normalization(epsilon: float) -> ir.Function:
    """Build the function y = x / rms(x) * weight over the last axis."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, weight = inputs
        mean_square = g.op("ReduceMean", g.op("Mul", x, x), [-1], keepdims=1)
        return g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean_square, epsilon))), weight)

    return build_function("RmsNormalization", ["x", "weight"], body, {"epsilon": epsilon})


def embedding() -> ir.Function:
    """Build a function that returns the rows of a table [vocab, dim] for tokens [...]."""
    return build_function("Embedding", ["table", "tokens"], lambda g, inputs: g.op("Gather", *inputs, axis=0))


def sinusoids(frequencies: Sequence[float]) -> ir.Function:
    """Build encodings [..., dim] of any int64 positions [...]: sine in even, cosine in odd channels."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        angles = _angles(g, inputs[0], frequencies)
        sine, cosine = g.op("Unsqueeze", g.op("Sin", angles), [-1]), g.op("Unsqueeze", g.op("Cos", angles), [-1])
        shape = g.op("Concat", g.op("Shape", inputs[0]), [2 * len(frequencies)], axis=0)
        return g.op("Reshape", g.op("Concat", sine, cosine, axis=-1), shape)

    return build_function("Sinusoids", ["positions"], body, {"dim": 2 * len(frequencies)})


def _angles(g: GraphBuilder, positions: ir.Value, frequencies: Sequence[float]) -> ir.Value:
    single = g.op("Cast", positions, to=ir.DataType.FLOAT)
    return g.op("Mul", g.op("Unsqueeze", single, [-1]), np.array(frequencies, np.float32))


def sines_and_cosines(frequencies: Sequence[float]) -> ir.Function:
    """Build a function for the sines, then the cosines [..., 2 * frequencies], of positions [...] * frequencies."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        angles = _angles(g, inputs[0], frequencies)
        return g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=-1)

    return build_function("SinesAndCosines", ["positions"], body, {"dim": 2 * len(frequencies)})


def stacked_frames(num_frames: int, bins: int) -> ir.Function:
    """Build a function that joins features [batch, frames, bins] to whole stacks [batch, time, num_frames * bins]."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        frames = g.op("Shape", inputs[0], start=1, end=2)
        whole = g.op("Mul", g.op("Div", frames, [num_frames]), [num_frames])
        return g.op("Reshape", g.op("Slice", inputs[0], [0], whole, [1]), [0, -1, num_frames * bins])

    return build_function("StackedFrames", ["features"], body, {"num_frames": num_frames, "bins": bins})


def time_windows(stride: int) -> ir.Function:
    """Build a function that concatenates every `stride`-th frame with its two neighbours.

    Multiplying the output by a weight matrix then gives a convolution with kernel 3. Inputs: `x` [batch, frames,
    channels]; `valid` [batch, frames, 1], 1 for real frames and 0 for padding. Padding and frames beyond either end
    count as zeros. Output: [batch, ceil(frames / stride), 3 * channels].
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        padded = g.op("Pad", g.op("Mul", *inputs), [0, 1, 0, 0, 1, 0])
        ends = ([-2], [-1], [END])
        return g.op("Concat", *(g.op("Slice", padded, [n], end, [1], [stride]) for n, end in enumerate(ends)), axis=-1)

    return build_function("TimeWindows", ["x", "valid"], body, {"stride": stride})


@dataclass(frozen=True, kw_only=True)
class SubsamplingLayer:
    """Convolutions over time and frequency without padding, each followed by ReLU; then a projection."""

    kernels: Sequence[int]  # size of each convolution's square kernel
    strides: Sequence[int]
    bins: int  # frequency bins of the features

    def function(self, flat_size: int) -> ir.Function:
        """Build the function that maps features [batch, frames, bins] to [batch, time, dim].

        Further inputs are `conv0` [channels, 1, kernel, kernel], `conv0_bias` [channels] and so on. The last are
        `weight` [flat_size, dim] and `bias` of the projection. The projection's input is ordered by channel.
        """

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            return affine(g, self._convolved(g, inputs, flat_size), inputs[1 + 2 * len(self.kernels) :])

        return build_function("Subsampling", [*self._names(), "weight", "bias"], body, self._attributes())

    def convolutions(self, flat_size: int) -> ir.Function:
        """Build the same function as `function`, but without the projection. The output is [batch, time, flat_size]."""
        name, attributes = "SubsamplingConvolutions", {**self._attributes(), "activation": "relu"}
        return build_function(name, self._names(), lambda g, x: self._convolved(g, x, flat_size), attributes)

    def _names(self) -> list[str]:
        return ["features", *itertools.chain(*((f"conv{n}", f"conv{n}_bias") for n in range(len(self.kernels))))]

    def _attributes(self) -> dict[str, Any]:
        return {"kernels": list(self.kernels), "strides": list(self.strides), "bins": self.bins}

    def _convolved(self, g: GraphBuilder, inputs: list[ir.Value], flat_size: int) -> ir.Value:
        x, *parameters = inputs
        x = g.op("Unsqueeze", x, [1])
        for index, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
            weights = parameters[2 * index : 2 * index + 2]
            x = g.op("Relu", g.op("Conv", x, *weights, kernel_shape=[kernel] * 2, strides=[stride] * 2))
        return g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3]), [0, 0, flat_size])


class Prefixes(NamedTuple):
    """Unique prefixes of the hypotheses [batch, nbest, length], ordered by utterance. `most` is the maximum of one.

    Padding of `of_tokens` and `of_utterances` may have any value.
    """

    ends: ir.Value  # index, among all tokens, of each prefix's last token [prefixes]
    of_tokens: ir.Value  # index of the prefix that ends with each token [batch, nbest, length]
    of_utterances: ir.Value  # indices of the prefixes of each utterance [batch, most]
    places: ir.Value  # index of each prefix in the flattened `of_utterances` [prefixes]


def shared_prefixes() -> ir.Function:
    """Build `Prefixes` of `tokens` [batch, nbest, length]. `lens` [batch, nbest, 1] are numbers of tokens minus 1."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
        tokens, lens = inputs

        def numbers(count: ir.Value) -> ir.Value:
            return g.op("Range", 0, g.op("Squeeze", count, [0]), 1)

        length, nbest = g.op("Shape", tokens, start=2), g.op("Shape", tokens, start=1, end=2)
        row = g.op("Unsqueeze", numbers(nbest), [1])
        exists = g.op("LessOrEqual", numbers(length), lens)
        differ = g.op("Not", g.op("Equal", g.op("Unsqueeze", tokens, [2]), g.op("Unsqueeze", tokens, [1])))
        num_different = g.op("CumSum", g.op("Cast", differ, to=ir.DataType.INT64), 3)
        is_equal = g.op("And", g.op("Equal", num_different, 0), g.op("Unsqueeze", exists, [1]))
        first = g.op("ArgMax", g.op("Cast", is_equal, to=ir.DataType.FLOAT), axis=2, keepdims=0)
        is_new = g.op("Cast", g.op("And", exists, g.op("Equal", first, row)), to=ir.DataType.INT64)
        flat = g.op("Reshape", is_new, [-1])
        ends = g.op("Reshape", g.op("NonZero", flat), [-1])
        place = g.op("Reshape", numbers(g.op("Shape", flat)), g.op("Shape", tokens))
        earlier = g.op("Mul", g.op("Sub", row, first), length)
        of_tokens = g.op("Gather", g.op("Sub", g.op("CumSum", flat, 0), 1), g.op("Sub", place, earlier))
        counts = g.op("ReduceSum", is_new, [1, 2], keepdims=0)
        begins = g.op("CumSum", counts, 0, exclusive=1)
        most, every = g.op("ReduceMax", counts, keepdims=1), numbers(g.op("Shape", ends))
        inside = g.op("Add", g.op("Unsqueeze", begins, [1]), numbers(most))
        of_utterances = g.op("Min", inside, g.op("Sub", g.op("Shape", ends), 1))
        utterance = g.op("Div", ends, g.op("Mul", nbest, length))
        places = g.op("Add", g.op("Mul", utterance, most), g.op("Sub", every, g.op("Gather", begins, utterance)))
        return [ends, of_tokens, of_utterances, places]

    return build_function("SharedPrefixes", ["tokens", "lens"], body)
