"""The front end with its convolutions as integer products, and the projection after them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from u2moe.quantize.passes.convolutions import FirstConvolutions, Window, int8_convolution
from u2moe.quantize.passes.quantized_rows import QuantizedRows
from u2moe.quantize.passes.rewrite import Rewrite, insert, new_call, only_reader, present
from u2moe.quantize.weights import Array, Quantized, Weights
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.file import array_of, group_of, shape_of


class QuantizeFrontEnd(Rewrite):
    """Before, the front end is a chain of at least two convolutions and a projection, or the graph has none.

    Afterwards the convolutions are products over [batch, time, frequency, channels], and the projection reads its input
    frequency by frequency instead of channel by channel. The first convolution stays in float32.
    """

    def requires(self, model: ir.Model) -> None:
        """The front end is in the form that the exporter writes."""
        nodes = _convolutions(model)
        if nodes:
            if len(nodes) < 2:
                raise BundleError(
                    f"node {nodes[0].name}: is the only convolution of the front end, expected two or more"
                )
            _features(model, nodes[0])
            _check_projection(_projection(nodes))

    def rewrite(self, model: ir.Model, weights: Weights) -> bool:
        """Replace the convolutions and the projection."""
        nodes = _convolutions(model)
        if not nodes:
            return False
        transpose, projection = _transpose(nodes), _projection(nodes)
        flatten = only_reader(transpose)
        x = _first_convolutions(model, weights, nodes, flatten)
        for node in nodes[2:]:
            quantized, window = _convolution_weight(weights, node), _window(node)
            inputs = [x, quantized.weight, quantized.scale, present(node, 2)]
            attributes = {"kernel": window.kernel, "stride": window.stride}
            x = insert(model.graph, new_call(model, int8_convolution(window), node, inputs, attributes), flatten)
        flatten.replace_input_with(0, x)
        channels = shape_of(present(nodes[-1], 1))[0]
        QuantizedRows(model, [projection]).multiply(projection, _permuted(weights, projection, channels), "relu")
        replaced = [part for node in reversed(nodes) for part in (only_reader(node), node)]
        model.graph.remove([transpose, *replaced], safe=True)
        return True

    def ensures(self, model: ir.Model) -> None:
        """No convolution of the front end is left."""
        for node in _convolutions(model):
            raise ir.passes.PostconditionError(f"node {node.name}: is in float32")


def _convolutions(model: ir.Model) -> list[ir.Node]:
    nodes = [node for node in model.graph if node.op_type == "Conv"]
    return [node for node in nodes if group_of(present(node, 1)) == "subsampling"]


def _transpose(nodes: list[ir.Node]) -> ir.Node:
    """The transposition that moves channels behind frequencies, after the relu of the last convolution."""
    return only_reader(only_reader(nodes[-1]))


def _projection(nodes: list[ir.Node]) -> ir.Node:
    return only_reader(only_reader(_transpose(nodes)))


def _features(model: ir.Model, node: ir.Node) -> tuple[ir.Value, int]:
    """The input of the first convolution before it gets a channel axis [batch, time, bins], and the number of bins."""
    unsqueeze, features = present(node, 0).producer(), model.graph.inputs[0]
    bins = features.shape[-1] if features.shape else None
    one_channel = shape_of(present(node, 1))[1] == 1
    if not one_channel or unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or not isinstance(bins, int):
        raise BundleError(f"node {node.name}: expected a convolution of features with one channel")
    return present(unsqueeze, 0), bins


def _check_projection(node: ir.Node) -> None:
    if node.op_type != "MatMul" or group_of(present(node, 1)) != "subsampling":
        raise BundleError(f"node {node.name}: found {node.op_type}, expected the projection of the front end")


def _first_convolutions(model: ir.Model, weights: Weights, nodes: list[ir.Node], before: ir.Node) -> ir.Value:
    """The first two convolutions in one call."""
    first, second = nodes[:2]
    weight, bias = present(first, 1), present(first, 2)
    channels, _, kernel, _ = shape_of(weight)

    def rows() -> Array:
        return np.vstack((array_of(weight).reshape(channels, kernel**2).T, array_of(bias)))

    first_weight = weights.add(
        f"{weight.name}.rows", ir.DataType.FLOAT, (kernel**2 + 1, channels), rows, group_of(weight)
    )
    quantized = _convolution_weight(weights, second)
    features, bins = _features(model, first)
    both = FirstConvolutions(bins=bins, channels=channels, first=_window(first), second=_window(second))
    inputs = [features, first_weight, quantized.weight, quantized.scale, present(second, 2)]
    return insert(model.graph, new_call(model, both.function(), second, inputs, both.attributes()), before)


def _convolution_weight(weights: Weights, node: ir.Node) -> Quantized:
    """The weight of a convolution as [time * frequency * in, out]."""
    weight = present(node, 1)
    out, inner, kernel, _ = shape_of(weight)
    return weights.int8(weight, lambda: array_of(weight).transpose(2, 3, 1, 0).reshape(kernel**2 * inner, out))


def _permuted(weights: Weights, projection: ir.Node, channels: int) -> Quantized:
    """The weight of the projection, its rows in the order [frequency, channel]."""
    weight = present(projection, 1)

    def rows() -> Array:
        array = array_of(weight)
        return array.reshape(channels, -1, array.shape[1]).swapaxes(0, 1).reshape(array.shape)

    return weights.int8(weight, rows)


def _window(node: ir.Node) -> Window:
    """The window of a convolution, from its weight and strides."""
    kernel = shape_of(present(node, 1))[-1]
    return Window(kernel=kernel, stride=int(node.attributes["strides"].as_ints()[0]))
