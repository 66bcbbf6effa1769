"""Convert graphs to half precision, or only store weights in float16."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, ShapeInferencePass

from u2moe.quantize.arithmetic import Array, relative_error
from u2moe.quantize.layers import Change, Weights, expert_layers, inputs_of, layer_of, stored_value, swap
from u2moe.quantize.recipes import FORMATS, Recipe
from u2moe.runtime.bundle.contract import GROUP_METADATA, MOE_DOMAIN
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle.weight_formats import FORMATS_OF_LAYERS, HALF
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.dispatch import float_mixture, mixture_of
from u2moe.runtime.graph.file import array_of, group_of, shape_of

POSITIONS = "Sinusoids"  # stays in float32: half precision represents integers exactly only up to 2048
LARGEST = float(np.finfo(np.float16).max)
MASK = float(np.finfo(np.float32).max)  # masks contain its negative, which becomes the lowest number in half precision
WEIGHT_ERROR, BIAS_ERROR = 2**-9, 2**-5  # largest relative errors; a bias near zero matters less than a weight


def in_half_precision(model: ir.Model, weights: Weights) -> None:
    """Convert the weights and the computation of a graph to float16; its inputs and outputs stay float32.

    All layers except mixtures and positions become plain nodes. Nodes with weights that half precision cannot represent
    stay float32. Values that pass between two such nodes also stay float32.
    """
    kept = {node.op_identifier() for node in model.graph if mixture_of(node) or _is_position(node)}
    InlinePass(lambda function: function.identifier() not in kept)(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    converter = _Converter(model, weights)
    converter.run()
    for layer in expert_layers(model):
        if layer.node not in converter.kept:
            mixture = dataclasses.replace(layer.mixture, weights=HALF.name)
            swap(model, layer.node, float_mixture(mixture), inputs_of(layer.node))


def half_of(value: ir.Value) -> Array:
    """Return the values of an initializer in half precision. Raises BundleError if a weight is clipped."""
    largest = float(np.abs(array_of(value)).max(initial=0))
    if largest > LARGEST and (largest < MASK or GROUP_METADATA in value.metadata_props):
        raise BundleError(f"{value.name}: a weight is {largest:g}, but half precision allows at most {LARGEST:g}")
    return np.asarray(np.clip(array_of(value), -LARGEST, LARGEST), np.float16)


def fits_half(value: ir.Value, tolerance: float) -> bool:
    """Return whether half precision changes each number by at most `tolerance` times its magnitude.

    In a matrix, the larger of two magnitudes counts: the number's own, and a typical one. The latter is the product of
    the norms of the number's row and column, divided by the norm of the matrix. The test then does not depend on
    the scales of channels.
    """
    array = array_of(value)
    if not np.abs(array).max(initial=0) <= LARGEST:
        return False
    sizes = np.abs(array.astype(np.float64)).reshape(len(array), -1)
    errors = np.abs(array.astype(np.float16).astype(np.float64) - array).reshape(sizes.shape)
    if array.ndim > 1:
        usual = np.outer(np.linalg.norm(sizes, axis=1), np.linalg.norm(sizes, axis=0)) / (np.linalg.norm(sizes) or 1)
        sizes = np.maximum(sizes, usual)
    return bool((errors <= tolerance * sizes).all())


class _Converter:
    def __init__(self, model: ir.Model, weights: Weights) -> None:
        self.graph, self.weights = model.graph, weights
        self.halves = dict[ir.Value, ir.Value]()  # half-precision copies of float32 inputs, weights and positions
        self.single = set[ir.Value]()  # values that stay float32 because they are computed from log-probabilities
        # nodes that compute in float32 because half precision cannot represent their weights
        self.kept = {node for node in model.graph if any(map(_is_lost, node.inputs))}
        self.floats = dict[ir.Value, ir.Value]()  # float32 outputs of these nodes, by their half-precision copies
        if self.kept:
            ShapeInferencePass()(model)  # infers types
            lost = [value for node in self.kept for value in node.inputs if value is not None and _is_lost(value)]
            weights.kept |= {str(value.name).rpartition(".")[0] for value in lost}

    def run(self) -> None:
        """Convert all nodes in order, then the outputs."""
        for node in list(self.graph):
            if _is_position(node):
                continue
            if node.op_type == "LogSoftmax":
                self._keep_single(node)
                self.single.update(node.outputs)
            elif any(value in self.single for value in node.inputs):
                self.single.update(node.outputs)
            else:
                (self._keep if node in self.kept else self._convert)(node)
        for output in self.graph.outputs:
            producer = output.producer()
            if producer is not None and output.dtype == ir.DataType.FLOAT and producer.inputs[0] not in self.single:
                self._keep_single(producer)
        for value in (value for node in self.graph for value in node.outputs if self.kept):
            if not value.is_graph_output():
                value.type = value.shape = None  # these were inferred for float32

    def _convert(self, node: ir.Node) -> None:
        """Convert a node and those of its inputs that are still float32: weights, inputs of the graph and positions."""
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        for index, value in enumerate(node.inputs):
            if value is None or group_of(value) == "routers":
                continue
            producer = value.producer()
            if value.dtype == ir.DataType.FLOAT if producer is None else _is_position(producer):
                if value not in self.halves:
                    self.halves[value] = self._weight(value) if value.const_value is not None else self._cast(value)
                node.replace_input_with(index, self.halves[value])

    def _keep(self, node: ir.Node) -> None:
        """Keep a node in float32: cast its float16 inputs to float32, and its outputs back to float16."""
        for index, value in enumerate(node.inputs):
            maker = None if value is None else value.producer()
            if maker is not None and value is not None and value.dtype == ir.DataType.FLOAT and not _is_position(maker):
                node.replace_input_with(index, self._single(node, value))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                uses, half = list(value.uses()), self._cast(value)
                half.type = value.type
                for use in uses:
                    use.node.replace_input_with(use.idx, half)
                self.floats[half] = value

    def _single(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return a value as float32; insert a cast before the node unless the value was computed in float32."""
        if value in self.floats:
            return self.floats[value]
        cast = _cast(value, ir.DataType.FLOAT, f"{node.name}/{value.name}/single")
        self.graph.insert_before(node, cast)
        return cast.outputs[0]

    def _weight(self, value: ir.Value) -> ir.Value:
        name, group = f"{value.name}.fp16", group_of(value)
        self.weights.changes[name] = Change(
            group=group, original=lambda: array_of(value), parts=(), restored=lambda stored: stored.astype(np.float32)
        )
        return self.weights.add(name, ir.DataType.FLOAT16, shape_of(value), partial(half_of, value), group)

    def _cast(self, value: ir.Value) -> ir.Value:
        node, producer = _cast(value, ir.DataType.FLOAT16, f"{value.name}/half"), value.producer()
        if producer is None:
            self.graph.insert_before(next(iter(self.graph)), node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def _keep_single(self, node: ir.Node) -> None:
        if (value := node.inputs[0]) is not None:
            node.replace_input_with(0, self._single(node, value))


def _is_lost(value: ir.Value | None) -> bool:
    """Return whether a value is a float32 weight or constant that float16 cannot represent. Routers do not count."""
    if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
        return False
    array = array_of(value)
    if GROUP_METADATA not in value.metadata_props:  # constants; masks among them become the lowest number
        return LARGEST < float(np.abs(array).max(initial=0)) < MASK
    if array.ndim > 1:
        return group_of(value) != "routers" and not fits_half(value, WEIGHT_ERROR)
    return not np.abs(array).max(initial=0) <= LARGEST or relative_error(array, array.astype(np.float16)) > BIAS_ERROR


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to}, name=name)
    node.outputs[0].name = name
    return node


def _is_position(node: ir.Node) -> bool:
    return node.domain == MOE_DOMAIN and plain_name(node.op_type) == POSITIONS


def store_halves(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Store some weights in float16, with a Cast after each.

    If the recipe assigns fp16 to a layer, its weights are stored in this way. Some formats also store their
    scales and biases in float16. Weights that half precision cannot represent stay float32.
    """
    for node in [node for node in model.graph if node.domain == MOE_DOMAIN]:
        is_kept = recipe.exceptions.get(layer_of(node)) == HALF.name
        kind = FORMATS_OF_LAYERS.get(plain_name(node.op_type))
        for value in node.inputs:
            if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
                continue
            shape, group, name = shape_of(value), group_of(value), str(value.name)
            if (is_kept and group in FORMATS) or (kind is not None and kind.halves and len(shape) == 1):
                if not fits_half(value, WEIGHT_ERROR if len(shape) > 1 or name.endswith(".scale") else BIAS_ERROR):
                    weights.kept.add(layer_of(node))
                    continue
                half = weights.add(f"{name}.half", ir.DataType.FLOAT16, shape, partial(half_of, value), group)
                cast = _cast(half, ir.DataType.FLOAT, f"{name}/Cast")
                del model.graph.initializers[name]
                cast.outputs[0].name = name
                value.replace_all_uses_with(cast.outputs[0])
                model.graph.insert_before(node, cast)


def read_single(file: Path) -> ir.Model:
    """Read a graph and restore its float16 weights to float32."""
    model = ir.load(file)
    weights = Weights(model)
    for node in list(model.graph):
        half = stored_value(node.outputs[0])
        if half is not node.outputs[0]:
            name, read = str(node.outputs[0].name), partial(array_of, half)
            value = weights.add(name, ir.DataType.FLOAT, shape_of(half), read, group_of(half))
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)
    return model
