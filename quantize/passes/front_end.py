"""Computes the convolutions of the front end except the first, and the projection after them, as integer products.

Convolutions are matrix products over [batch, time, frequency, channels]. Each output frame has one activation scale for
its whole receptive field, so that its values do not depend on its chunk. The first convolution stays in float32,
because it reads features. The inputs of the other convolutions and of the projection are never negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize.arithmetic import POSITIVE_LEVELS, Array, kernel_matrix
from u2moe.quantize.formats import conversion_for
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.layers import Weights, calls, inputs_of, insert, layer_of, swap
from u2moe.quantize.recipes import Recipe
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function
from u2moe.runtime.graph.file import array_of, group_of, shape_of

STEP = 1 / POSITIVE_LEVELS
ZERO = np.array(0, np.uint8)
NUM_PORTIONS = 4
"""Number of portions in which frames pass through the first convolution. With full context, the float32 output of this
convolution would need more memory than anything else; therefore only one portion of it exists at a time. With few
frames some portions are empty."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The kernel size and stride of a square convolution without padding."""

    kernel: int
    stride: int

    def length(self, size: int) -> int:
        """Return the number of output positions for `size` input positions."""
        return (size - self.kernel) // self.stride + 1

    def places(self, width: int) -> npt.NDArray[np.int64]:
        """Return the indices [kernel ** 2] of the first inputs in a flattened matrix of this width."""
        return (np.arange(self.kernel)[:, np.newaxis] * width + np.arange(self.kernel)).ravel()


@dataclass(frozen=True, kw_only=True)
class FirstConvolutions:
    """Y = relu(conv(relu(conv(x)))), from features x [batch, time, bins] to [batch, time, frequency, channels].

    The first convolution is in float32 and recomputed for every output frame of the second convolution. The receptive
    field of such a frame is then contiguous: it is quantized in one step, and its values are gathered as integers. For
    each of these frames, the first convolution is one matrix product, small enough for the cache. The rounding maps
    negative values to zero, and thus replaces the first relu. Frames pass through the first convolution in portions, so
    that little of its output exists at a time.
    """

    bins: int  # mel bins of a feature frame
    channels: int  # between the two convolutions
    first: Window
    second: Window

    @property
    def inner(self) -> int:
        """Number of frequencies between the two convolutions."""
        return self.first.length(self.bins)

    @property
    def length(self) -> int:
        """Number of feature frames from which both convolutions compute a frame."""
        return self.first.stride * (self.second.kernel - 1) + self.first.kernel

    def function(self) -> ir.Function:
        """Build the function, which has four more inputs after x.

        `first_weight` [kernel * kernel + 1, channels] has rows in the order (time, frequency), then the bias.
        `weight` is int8 [kernel * kernel * channels, out] with rows in the order (time, frequency, channels). `scale`
        and `bias` are [out].
        """
        kernels = [self.first.kernel, self.second.kernel]
        strides = [self.first.stride, self.second.stride]
        attributes = {"bins": self.bins, "channels": self.channels, "kernels": kernels, "strides": strides}
        parameters = ["x", "first_weight", "weight", "scale", "bias"]
        return build_function("Int8FirstConvolutions", parameters, self._body, attributes)

    def _body(self, g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, first_weight, weight, scale, bias = inputs
        patches, num_frames = self._patches(g, x)
        q, row_scale = _first(g, patches, first_weight)
        values = g.op("Reshape", q, [0, self.second.kernel * self.inner, self.channels])
        outer = self.second.length(self.inner)  # number of frequencies after both convolutions
        seen = np.arange(outer)[:, np.newaxis] * self.second.stride + self.second.places(self.inner)
        rows = g.op("Reshape", g.op("Gather", values, seen, axis=1), [0, outer, seen.shape[1] * self.channels])
        unit = g.op("MatMulIntegerToFloat", rows, weight, 1.0, scale, ZERO, domain=CONTRIB)
        product = g.op("Mul", unit, g.op("Unsqueeze", row_scale, [1, 2]))
        y = g.op("Relu", g.op("Add", product, bias))  # [frames, frequencies, out]
        batch, frames = g.op("Shape", x, start=0, end=1), g.op("Unsqueeze", num_frames, [0])
        shape = g.op("Concat", batch, frames, [outer], g.op("Shape", bias), axis=0)
        return g.op("Reshape", y, shape, allowzero=1)

    def _patches(self, g: GraphBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the input patches of the first convolution, each with a 1 for the bias, and the number of frames.

        The patches have the shape [batch * frames, second.kernel * inner, first.kernel ** 2 + 1].
        """
        stride = self.first.stride * self.second.stride
        time = g.op("Squeeze", g.op("Shape", x, start=1, end=2))
        num_frames = g.op("Div", g.op("Max", g.op("Sub", time, self.length - stride), 0), stride)
        starts = g.op("Range", 0, g.op("Mul", num_frames, stride), stride)
        times = g.op("Add", g.op("Unsqueeze", starts, [-1]), np.arange(self.length))
        windows = g.op("Reshape", g.op("Gather", x, times, axis=1), [0, 0, self.length * self.bins])
        with_one = g.op("Pad", windows, [0, 0, 0, 0, 0, 1], 1.0)
        # indices into windows, to which the 1 for the bias has been appended
        corner = np.arange(self.second.kernel)[:, np.newaxis] * self.bins + np.arange(self.inner)
        inside = corner.reshape(-1, 1) * self.first.stride + self.first.places(self.bins)
        seen = np.column_stack((inside, np.full(len(inside), self.length * self.bins)))
        patches = g.op("Flatten", g.op("Gather", with_one, seen, axis=2), axis=2)
        return g.op("Reshape", patches, [0, *seen.shape]), num_frames


def _first(g: GraphBuilder, patches: ir.Value, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Compute the output of the first convolution as integers, and the scale of each frame."""
    num_frames = g.op("Shape", patches, start=0, end=1)
    sizes = g.op("Div", g.op("Add", num_frames, np.arange(NUM_PORTIONS)), [NUM_PORTIONS])
    integers, scales = list[ir.Value](), list[ir.Value]()
    for portion in g.ops("Split", patches, sizes, axis=0, num_outputs=NUM_PORTIONS):
        # adding and subtracting this delays a portion until the previous one is rounded and its output freed
        before = g.op("Shape", integers[-1] if integers else patches, start=0, end=1)
        size = g.op("Sub", g.op("Add", g.op("Shape", portion, start=0, end=1), before), before)
        weights = g.op("Expand", weight, g.op("Concat", size, g.op("Shape", weight), axis=0))
        rows = g.op("Flatten", g.op("MatMul", portion, weights), axis=1)
        # before version 1.32, onnxruntime gives the row maximum of an empty matrix the shape of that matrix
        peak = g.op("Reshape", g.op("ReduceMax", rows, [-1], keepdims=0), size, allowzero=1)
        scales.append(g.op("Mul", g.op("Relu", peak), STEP))
        integers.append(g.op("QuantizeLinear", rows, scales[-1], axis=0))
    return g.op("Concat", *integers, axis=0), g.op("Concat", *scales, axis=0)


def int8_convolution(window: Window) -> ir.Function:
    """Build y = relu(conv(x)) for x >= 0 [batch, time, frequency, channels], without padding, as one matrix product.

    `weight` is int8 [kernel * kernel * in, out] in the order (time, frequency, in). Windows are gathered in time before
    quantization, and in frequency after it, as bytes.
    """
    kernel, stride = window.kernel, [window.stride]
    slices = [([index], [index - kernel + 1 if index < kernel - 1 else END]) for index in range(kernel)]

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, weight, scale, bias = inputs
        frames = [g.op("Slice", x, *ends, [1], stride) for ends in slices]
        peak = g.op("Max", *(g.op("ReduceMax", frame, [2, 3], keepdims=1) for frame in frames))
        frame_scale = g.op("Mul", peak, STEP)
        patches = []
        for frame in frames:
            q = g.op("QuantizeLinear", g.op("Div", frame, frame_scale), 1.0, ZERO)
            patches += [g.op("Slice", q, *ends, [2], stride) for ends in slices]
        rows = g.op("Concat", *patches, axis=-1)
        unit = g.op("MatMulIntegerToFloat", rows, weight, 1.0, scale, ZERO, domain=CONTRIB)
        return g.op("Relu", g.op("Add", g.op("Mul", unit, frame_scale), bias))

    attributes = {"kernel": window.kernel, "stride": window.stride}
    return build_function("Int8Convolution", ["x", "weight", "scale", "bias"], body, attributes)


def quantize_front_end(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Quantize the projection of the front end, and its convolutions except the first.

    The convolutions become products over [batch, time, frequency, channels]. The first stays in float32; the others are
    int8, whichever format the recipe has for the front end. The projection reads its input frequency by frequency
    instead of channel by channel.
    """
    for node in calls(model, "Subsampling"):
        conversion = conversion_for(recipe, layer_of(node), "subsampling")
        if conversion is None:
            continue
        features, *convolutions, projection, bias = inputs_of(node)
        sizes = (node.attributes[name].as_ints() for name in ("kernels", "strides"))
        windows = [Window(kernel=kernel, stride=stride) for kernel, stride in zip(*sizes, strict=True)]
        bins, channels = node.attributes["bins"].as_int(), shape_of(convolutions[0])[0]
        form = FirstConvolutions(bins=bins, channels=channels, first=windows[0], second=windows[1])
        (x,) = insert(model, node, form.function(), [features, *_first_weights(weights, form, convolutions)])
        for window, weight, added in zip(windows[2:], convolutions[4::2], convolutions[5::2], strict=True):
            parts = weights.converted(weight, Int8Conversion(), change=kernel_matrix)
            (x,) = insert(model, node, int8_convolution(window), [x, *parts, added])
        flat, outputs = np.array([0, 0, shape_of(projection)[0]]), shape_of(convolutions[-1])[0]
        shape = weights.add(f"{node.name}/shape", ir.DataType.INT64, (3,), partial(np.copy, flat), "other")
        flatten = ir.node("Reshape", [x, shape], name=f"{node.name}/Reshape")
        flatten.outputs[0].name = flatten.name
        model.graph.insert_before(node, flatten)
        parts = weights.converted(projection, conversion, change=partial(_permuted, outputs))
        function = conversion.linear(*shape_of(projection), bias=True, after="relu")
        swap(model, node, function, [flatten.outputs[0], *parts, bias])


def _first_weights(weights: Weights, form: FirstConvolutions, convolutions: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the inputs that follow the features in the call that computes the first two convolutions."""
    weight, bias, second, second_bias = convolutions[:4]
    shape = (form.first.kernel**2 + 1, form.channels)

    def rows() -> Array:
        return np.vstack((array_of(weight).reshape(form.channels, -1).T, array_of(bias)))

    first = weights.add(f"{weight.name}.rows", ir.DataType.FLOAT, shape, rows, group_of(weight))
    return [first, *weights.converted(second, Int8Conversion(), change=kernel_matrix), second_bias]


def _permuted(channels: int, weight: Array) -> Array:
    """Return the projection's weight with its rows in the order [frequency, channel]."""
    return np.asarray(weight.reshape(channels, -1, weight.shape[1]).swapaxes(0, 1).reshape(weight.shape))
