"""Convolutions of the front end as integer matrix products over [batch, time, frequency, channels], as ONNX functions.

An output frame has one activation scale, of all that it looks at: its numbers then do not depend on its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize.functions import make_function

_PORTIONS = 4
"""In which frames go through the first convolution: its output in float32 is what takes most memory of all in full
context, and only one of them is there at a time. Of few frames some are empty."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a square convolution without padding looks at."""

    kernel: int
    stride: int

    def length(self, size: int) -> int:
        """Positions of the output for `size` of the input."""
        return (size - self.kernel) // self.stride + 1


def int8_first_convolutions(bins: int, channels: int, first: Window, second: Window) -> ir.Function:
    """Y = relu(conv(relu(conv(x)))) over features x [batch, time, bins], to [batch, time, frequency, channels].

    The first convolution is in float32, and computed anew for every frame of the second: what that looks at then lies
    together, is searched for its largest value and rounded in one piece, and nothing has to be cut out in float32.
    It is one product for each of these frames, of a size that a cache holds. Its relu is in the rounding, which makes
    zeros of what is negative. Frames go through it in portions, so that little of its output is there at a time.

    `first_weight` [kernel * kernel + 1, channels] has the rows (time, frequency), and the bias in the last; `weight` is
    int8 [kernel * kernel * channels, out] in the order (time, frequency, channels), `scale` and `bias` are [out].
    """
    inner, outer = first.length(bins), second.length(first.length(bins))
    length, stride = first.stride * (second.kernel - 1) + first.kernel, first.stride * second.stride
    body = f"""
    last = Constant<value = int64[1] {{-1}}>()
    axis = Constant<value = int64[1] {{0}}>()
    place = Constant<value = int64[2] {{1, 2}}>()
    one = Constant<value = float {{1.0}}>()
    step = Constant<value = float {{0.00392156862745098}}>()
    zero = Constant<value = uint8 {{0}}>()
    none = Constant<value = int64 {{0}}>()
    stride = Constant<value = int64 {{{stride}}}>()
    overlap = Constant<value = int64 {{{length - stride}}}>()
    time_in_window = {_integers(np.arange(length))}
    window_shape = Constant<value = int64[3] {{0, 0, {length * bins}}}>()
    one_behind = Constant<value = int64[6] {{0, 0, 0, 0, 0, 1}}>()
    seen_by_first = {_integers(_seen_by_first(bins, inner, first, second))}
    patches_shape = Constant<value = int64[3] {{0, {second.kernel * inner}, {first.kernel**2 + 1}}}>()
    first_shape = Constant<value = int64[3] {{0, {second.kernel * inner}, {channels}}}>()
    seen_by_second = {_integers(_seen_by_second(inner, outer, second))}
    second_shape = Constant<value = int64[3] {{0, {outer}, {second.kernel**2 * channels}}}>()

    batch = Shape<start = 0, end = 1>(x)
    time_axis = Shape<start = 1, end = 2>(x)
    time = Squeeze(time_axis)
    room = Sub(time, overlap)
    room_or_none = Max(room, none)
    num_frames = Div(room_or_none, stride)
    end = Mul(num_frames, stride)
    starts = Range(none, end, stride)
    start_column = Unsqueeze(starts, last)
    times = Add(start_column, time_in_window)
    frames = Gather<axis = 1>(x, times)
    windows = Reshape(frames, window_shape)
    windows_and_one = Pad(windows, one_behind, one)
    patches = Gather<axis = 2>(windows_and_one, seen_by_first)
    frames_axis = Unsqueeze(num_frames, axis)
    weight_shape = Shape(first_weight)
    patches_of_frame = Flatten<axis = 2>(patches)
    patches_of_all = Reshape(patches_of_frame, patches_shape)
    all_frames = Shape<start = 0, end = 1>(patches_of_all)
    portions = Constant<value = int64[1] {{{_PORTIONS}}}>()
    numbers = Constant<value = int64[{_PORTIONS}] {{{", ".join(map(str, range(_PORTIONS)))}}}>()
    shared = Add(all_frames, numbers)
    sizes = Div(shared, portions)
    {_named("patches")} = Split<axis = 0>(patches_of_all, sizes)
    """
    # onnxruntime before 1.32 gives the largest values of each row of an empty matrix the shape of that matrix
    for index in range(_PORTIONS):
        # what is added and taken off again makes a portion wait until that before it is rounded, and its output freed
        body += f"""
        before{index} = Shape<start = 0, end = 1>({f"q{index - 1}" if index else "patches"})
        own_axis{index} = Shape<start = 0, end = 1>(patches{index})
        waiting_axis{index} = Add(own_axis{index}, before{index})
        portion_axis{index} = Sub(waiting_axis{index}, before{index})
        each{index} = Concat<axis = 0>(portion_axis{index}, weight_shape)
        first_weights{index} = Expand(first_weight, each{index})
        first{index} = MatMul(patches{index}, first_weights{index})
        rows{index} = Flatten<axis = 1>(first{index})
        largest{index} = ReduceMax<keepdims = 0>(rows{index}, last)
        highest{index} = Reshape<allowzero = 1>(largest{index}, portion_axis{index})
        peak{index} = Relu(highest{index})
        row_scale{index} = Mul(peak{index}, step)
        q{index} = QuantizeLinear<axis = 0>(rows{index}, row_scale{index})
        """
    body += f"""
    row_scale = Concat<axis = 0>({_named("row_scale")})
    q = Concat<axis = 0>({_named("q")})
    places = Reshape(q, first_shape)
    seen = Gather<axis = 1>(places, seen_by_second)
    second_rows = Reshape(seen, second_shape)
    unit = com.microsoft.MatMulIntegerToFloat(second_rows, weight, one, scale, zero)
    factors = Unsqueeze(row_scale, place)
    product = Mul(unit, factors)
    sum = Add(product, bias)
    activated = Relu(sum)
    bias_shape = Shape(bias)
    frequencies = Constant<value = int64[1] {{{outer}}}>()
    y_shape = Concat<axis = 0>(batch, frames_axis, frequencies, bias_shape)
    y = Reshape<allowzero = 1>(activated, y_shape)
    """
    name = f"Int8FirstConvolutions_{bins}_{channels}"
    name += "".join(f"_{window.kernel}x{window.kernel}_stride{window.stride}" for window in (first, second))
    return make_function(name, ("x", "first_weight", "weight", "scale", "bias"), body)


def _named(name: str) -> str:
    """A value of every portion."""
    return ", ".join(f"{name}{index}" for index in range(_PORTIONS))


def _seen_by_first(bins: int, inner: int, first: Window, second: Window) -> npt.NDArray[np.int64]:
    """Indices into a window [time * bins] and the one behind it, [second.kernel * inner, first.kernel ** 2 + 1]."""
    time, frequency = np.meshgrid(np.arange(second.kernel), np.arange(inner), indexing="ij")
    corner = (time * bins + frequency).ravel() * first.stride
    inside = (np.arange(first.kernel)[:, np.newaxis] * bins + np.arange(first.kernel)).ravel()
    end = (first.stride * (second.kernel - 1) + first.kernel) * bins
    return np.column_stack((corner[:, np.newaxis] + inside, np.full(len(corner), end)))


def _seen_by_second(inner: int, outer: int, second: Window) -> npt.NDArray[np.int64]:
    """Indices into what the first convolution gives for a window [second.kernel * inner], [outer, kernel ** 2]."""
    inside = (np.arange(second.kernel)[:, np.newaxis] * inner + np.arange(second.kernel)).ravel()
    return np.arange(outer)[:, np.newaxis] * second.stride + inside


def _integers(values: npt.NDArray[np.int64]) -> str:
    """A constant in ONNX's text form."""
    shape, flat = ", ".join(map(str, values.shape)), ", ".join(map(str, values.ravel()))
    return f"Constant<value = int64[{shape}] {{{flat}}}>()"


def int8_convolution(kernel: int, stride: int) -> ir.Function:
    """Y = relu(conv(x)) over [batch, time, frequency, channels] of x >= 0, without padding, as one matrix product.

    `weight` is int8 [kernel * kernel * in, out] in the order (time, frequency, in). Frames are quantized after they
    are cut out in time, and cut in frequency as bytes.
    """
    body = """
    step = Constant<value = float {0.00392156862745098}>()
    zero = Constant<value = uint8 {0}>()
    time = Constant<value = int64[1] {1}>()
    frequency = Constant<value = int64[1] {2}>()
    inner = Constant<value = int64[2] {2, 3}>()
    """
    body += f"stride = Constant<value = int64[1] {{{stride}}}>()\n"
    for index in range(kernel):
        end = index - kernel + 1 if index < kernel - 1 else 2**63 - 1
        body += f"""
        start{index} = Constant<value = int64[1] {{{index}}}>()
        end{index} = Constant<value = int64[1] {{{end}}}>()
        frames{index} = Slice(x, start{index}, end{index}, time, stride)
        largest{index} = ReduceMax<keepdims = 1>(frames{index}, inner)
        """
    body += f"peak = Max({', '.join(f'largest{index}' for index in range(kernel))})\n"
    for index in range(kernel):
        body += f"""
        ratio{index} = Div(frames{index}, peak)
        q{index} = QuantizeLinear(ratio{index}, step, zero)
        """
        for other in range(kernel):
            body += f"patch{index}_{other} = Slice(q{index}, start{other}, end{other}, frequency, stride)\n"
    patches = ", ".join(f"patch{index}_{other}" for index in range(kernel) for other in range(kernel))
    body += f"""
    patches = Concat<axis = -1>({patches})
    unit = com.microsoft.MatMulIntegerToFloat(patches, weight, step, scale, zero)
    product = Mul(unit, peak)
    sum = Add(product, bias)
    y = Relu(sum)
    """
    return make_function(f"Int8Convolution_{kernel}x{kernel}_stride{stride}", ("x", "weight", "scale", "bias"), body)
