"""The front end with its convolutions as integer products, and the projection after them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from u2moe.quantize.calls import calls, inputs_of, insert, layer_of, swap
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.formats.table import conversion_for
from u2moe.quantize.passes.convolutions import FirstConvolutions, Window, int8_convolution
from u2moe.quantize.recipes import Recipe
from u2moe.quantize.weights import Array, Weights
from u2moe.runtime.graph.file import array_of, group_of, shape_of


def quantize_front_end(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Replace the convolutions and the projection of the front end; convolutions are int8 in any format.

    The convolutions become products over [batch, time, frequency, channels], and the projection reads its input
    frequency by frequency instead of channel by channel. The first convolution stays in float32.
    """
    for node in calls(model, "Subsampling"):
        conversion = conversion_for(recipe, layer_of(node), "subsampling")
        if conversion is None:
            continue
        features, *convolutions, projection, bias = inputs_of(node)
        sizes = (node.attributes[name].as_ints() for name in ("kernels", "strides"))
        windows = [Window(kernel=kernel, stride=stride) for kernel, stride in zip(*sizes, strict=True)]
        form = FirstConvolutions(
            bins=node.attributes["bins"].as_int(),
            channels=shape_of(convolutions[0])[0],
            first=windows[0],
            second=windows[1],
        )
        (x,) = insert(model, node, form.function(), [features, *_first_weights(weights, form, convolutions)])
        for window, weight, added in zip(windows[2:], convolutions[4::2], convolutions[5::2], strict=True):
            (x,) = insert(model, node, int8_convolution(window), [x, *_convolution_weight(weights, weight), added])
        flat = np.array([0, 0, shape_of(projection)[0]])
        shape = weights.add(f"{node.name}/shape", ir.DataType.INT64, (3,), partial(np.copy, flat), "other")
        flatten = ir.node("Reshape", [x, shape], name=f"{node.name}/Reshape")
        flatten.outputs[0].name = flatten.name
        model.graph.insert_before(node, flatten)
        parts = weights.converted(projection, conversion, read=partial(_permuted, projection, form.channels))
        function = conversion.linear(*shape_of(projection), bias=True, after="relu")
        swap(model, node, function, [flatten.outputs[0], *parts, bias])


def _first_weights(weights: Weights, form: FirstConvolutions, convolutions: Sequence[ir.Value]) -> list[ir.Value]:
    """The inputs of the first two convolutions in one call, after the features."""
    weight, bias, second, second_bias = convolutions[:4]
    shape = (form.first.kernel**2 + 1, form.channels)

    def rows() -> Array:
        return np.vstack((array_of(weight).reshape(form.channels, -1).T, array_of(bias)))

    first = weights.add(f"{weight.name}.rows", ir.DataType.FLOAT, shape, rows, group_of(weight))
    return [first, *_convolution_weight(weights, second), second_bias]


def _convolution_weight(weights: Weights, weight: ir.Value) -> list[ir.Value]:
    """The weight of a convolution as [time * frequency * in, out]."""
    out, inner, kernel, _ = shape_of(weight)

    def read() -> Array:
        return array_of(weight).transpose(2, 3, 1, 0).reshape(kernel**2 * inner, out)

    return weights.converted(weight, Int8Conversion(), read=read)


def _permuted(weight: ir.Value, channels: int) -> Array:
    """The weight of the projection, its rows in the order [frequency, channel]."""
    array = array_of(weight)
    permuted: Array = array.reshape(channels, -1, array.shape[1]).swapaxes(0, 1).reshape(array.shape)
    return permuted
