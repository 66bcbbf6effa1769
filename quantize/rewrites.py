"""Rewrites of a float32 graph of ours into one that computes on quantized weights, counting what they change.

Weights are found by their name in the contract and the node that reads them, never by operator type alone; anything
that a recipe asks for and the graph has in another form is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize import convolutions, experts, functions
from u2moe.quantize.arithmetic import int4_blocks, int8_columns, int8_rows
from u2moe.quantize.config import Recipe
from u2moe.runtime import contract
from u2moe.runtime.errors import BundleError

Array = npt.NDArray[Any]
MOE_FUNCTION = re.compile(r"MixtureOfExperts_top(\d+)of(\d+)_([a-z]+?)(_no_bias)?$")
EXPERT_NUMBER = re.compile(r"experts\.\d+\.")
WEIGHT_AXES = 2


@dataclass(frozen=True, kw_only=True)
class Change:
    """One weight that a rewrite replaced."""

    group: str
    format: str
    original: Callable[[], Array]
    """Reads the float32 weight [in, out] (an embedding: [vocab, dim]), rows in the order that the new one has."""


def rewrite(model: ir.Model, recipe: Recipe) -> dict[str, Change]:
    """Quantize a graph in place; weights are read and converted only when the graph is saved.

    Returns:
        What was replaced, by the name of the new integer weight.

    Raises:
        BundleError: the graph holds a node that is not as the exporter writes it.
    """
    rewriter = Rewriter(model, recipe)
    rewriter.run()
    return rewriter.changes


@dataclass(frozen=True)
class _Quantized:
    """Integer weights and their scales, as initializers."""

    weight: ir.Value
    scale: ir.Value


class Rewriter:
    """One graph and the formats that its weights shall get."""

    def __init__(self, model: ir.Model, recipe: Recipe) -> None:
        self.model = model
        self.graph = model.graph
        self.formats = recipe.quantized
        self.block_size = recipe.block_size
        self.skip_below = recipe.skip_expert_below
        self.changes: dict[str, Change] = {}
        self.rows: dict[ir.Value, Sequence[ir.Value]] = {}
        """Quantized rows of what products multiply, and their largest magnitudes."""

    def run(self) -> None:
        """All rewrites, then the removal of what no node reads any more."""
        if "subsampling" in self.formats:
            self._convolutions()
        for node in list(self.graph):
            if node.domain == contract.MOE_DOMAIN:
                self._mixture_of_experts(node)
            elif node.op_type == "MatMul":
                self._matmul(node)
            elif node.op_type == "Gather":
                self._embedding(node)
        self.graph.opset_imports.update({contract.MOE_DOMAIN: 1, functions.CONTRIB: 1})
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def _format(self, weight: ir.Value | None, *, router: bool = True) -> str | None:
        """The format that this weight shall get; None if it stays as it is."""
        if weight is None or weight.const_value is None or weight.name is None:
            return None
        group = contract.weight_group(weight.name)
        if group == "routers" and not router:
            group = "feed_forward"
        return self.formats.get(group)

    def _initializer(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Array]
    ) -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]

        def load() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(read()), name=name)

        tensor = ir.LazyTensor(load, dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _int8(self, weight: ir.Value, group: str, read: Callable[[], Array] | None = None) -> _Quantized:
        """Columns of a weight [in, out] as int8; `read` gives it if the initializer has another form."""
        source = read or (lambda: _array(weight))
        columns = source().shape if read else _shape(weight)
        if len(columns) != WEIGHT_AXES:
            raise BundleError(f"weight {weight.name}: has shape {columns}, expected [in, out]")
        self.changes[f"{weight.name}.int8"] = Change(group=group, format="int8", original=source)
        return _Quantized(
            self._initializer(f"{weight.name}.int8", ir.DataType.INT8, columns, lambda: int8_columns(source())[0]),
            self._initializer(
                f"{weight.name}.scale", ir.DataType.FLOAT, columns[1:], lambda: int8_columns(source())[1]
            ),
        )

    def _call(self, function: ir.Function, node: ir.Node, inputs: Sequence[ir.Value]) -> None:
        """Put a call of `function` in the place of `node`, which has one output."""
        _replace(self.graph, node, self._new_call(function, node, inputs))

    def _new_call(self, function: ir.Function, near: ir.Node, inputs: Sequence[ir.Value]) -> ir.Node:
        """A call of `function`, named after the scope of the node `near`; not in the graph yet."""
        self.model.functions.setdefault(function.identifier(), function)
        name = (near.name or "").rsplit("/", 1)[0] + f"/{function.name}"
        return ir.Node(function.domain, function.name, inputs, num_outputs=len(function.outputs), name=name)

    def _product(self, node: ir.Node, x: ir.Value, weight: _Quantized, kind: str | None = None) -> None:
        """Put an integer product in the place of the MatMul `node`; x is quantized once for all that multiply it.

        `kind` is the activation that gave x.
        """
        if x not in self.rows:
            call = self._new_call(functions.int8_rows(kind), node, [x])
            for output, part in zip(call.outputs, ("q", "peak"), strict=True):
                output.name = f"{call.name}/{part}"
            self.graph.insert_before(node, call)
            self.rows[x] = call.outputs
        self._call(functions.int8_matmul(), node, [*self.rows[x], weight.weight, weight.scale])

    def _matmul(self, node: ir.Node) -> None:
        x, weight = node.inputs
        if x is None or weight is None or self._format(weight, router=False) != "int8":
            return
        group = contract.weight_group(weight.name or "").replace("routers", "feed_forward")
        self._product(node, x, self._int8(weight, group), _activation(x))

    def _embedding(self, node: ir.Node) -> None:
        table, tokens = node.inputs
        if table is None or tokens is None or self._format(table) != "int8":
            return
        rows, dim = _shape(table)
        name = f"{table.name}.int8"
        self.changes[name] = Change(group="embeddings", format="int8 rows", original=lambda: _array(table))
        weight = self._initializer(name, ir.DataType.INT8, (rows, dim), lambda: int8_rows(_array(table))[0])
        scale = self._initializer(
            f"{table.name}.scale", ir.DataType.FLOAT, (rows, 1), lambda: int8_rows(_array(table))[1]
        )
        self._call(functions.int8_embedding(), node, [weight, scale, tokens])

    def _mixture_of_experts(self, node: ir.Node) -> None:
        match = MOE_FUNCTION.match(node.op_type)
        if match is None:
            if node.op_type.startswith("Int8"):  # the front end, which comes first
                return
            raise BundleError(f"node {node.name}: {node.op_type} is no mixture of experts of this version")
        kind = self.formats.get("experts")
        top_k, num_experts, activation, has_bias = int(match[1]), int(match[2]), match[3], match[4] is None
        skip_below = self.skip_below if top_k > 1 else 0.0
        x, gate, *weights = (_present(node, value) for value in node.inputs)
        if kind == "int8":
            inputs = self._int8_experts(weights, has_bias=has_bias)
            function = experts.int8_mixture_of_experts(
                num_experts, top_k, activation, has_bias=has_bias, skip_below=skip_below
            )
        elif kind == "int4":
            inputs = self._int4_experts(weights, has_bias=has_bias)
            dim, hidden = _shape(weights[0])
            sizes = experts.Int4Sizes(dim=dim, hidden=hidden, block_size=self.block_size)
            function = experts.int4_mixture_of_experts(
                num_experts, top_k, activation, sizes, has_bias=has_bias, skip_below=skip_below
            )
        elif skip_below:
            inputs = weights
            function = experts.float_mixture_of_experts(
                num_experts, top_k, activation, has_bias=has_bias, skip_below=skip_below
            )
        else:
            return
        self.model.functions.pop((node.domain, node.op_type, ""), None)
        self._call(function, node, [x, gate, *inputs])

    def _int8_experts(self, weights: Sequence[ir.Value], *, has_bias: bool) -> list[ir.Value]:
        """Inputs of the function behind x and the router, of the float32 weights and biases of all experts."""
        biases = weights[1::2] if has_bias else []
        inputs = [self._stacked(biases[1::2])] if biases else []
        for index, weight in enumerate(weights[:: 2 if has_bias else 1]):
            quantized = self._int8(weight, "experts")
            inputs += [quantized.weight, quantized.scale, *(biases[index : index + 1] if index % 2 == 0 else [])]
        return inputs

    def _int4_experts(self, weights: Sequence[ir.Value], *, has_bias: bool) -> list[ir.Value]:
        biases, inputs = weights[1::2] if has_bias else [], []
        for index, weight in enumerate(weights[:: 2 if has_bias else 1]):
            quantized = self._int4(weight)
            inputs += [quantized.weight, quantized.scale, *biases[index : index + 1]]
        return inputs

    def _stacked(self, biases: Sequence[ir.Value]) -> ir.Value:
        """Biases of all experts [experts, out], as one initializer named without the expert's number."""
        name = EXPERT_NUMBER.sub("experts.", biases[0].name or "", count=1)
        shape = (len(biases), *_shape(biases[0]))
        return self._initializer(name, ir.DataType.FLOAT, shape, lambda: np.stack([_array(bias) for bias in biases]))

    def _int4(self, weight: ir.Value) -> _Quantized:
        rows, columns = _shape(weight)
        blocks, size = -(-rows // self.block_size), self.block_size
        self.changes[f"{weight.name}.int4"] = Change(group="experts", format="int4", original=lambda: _array(weight))
        return _Quantized(
            self._initializer(
                f"{weight.name}.int4",
                ir.DataType.UINT8,
                (columns, blocks, size // 2),
                lambda: int4_blocks(_array(weight), size)[0],
            ),
            self._initializer(
                f"{weight.name}.scale",
                ir.DataType.FLOAT,
                (columns * blocks,),
                lambda: np.ravel(int4_blocks(_array(weight), size)[1]),
            ),
        )

    def _convolutions(self) -> None:
        """Turn the convolutions of the front end into integer matrix products over [batch, time, frequency, channels].

        The first stays in float32. The projection behind them then reads its input frequency by frequency instead of
        channel by channel.
        """
        nodes = [node for node in self.graph if (node.name or "").startswith("encoder/embed/conv.")]
        nodes = [node for node in nodes if node.op_type == "Conv"]
        if len(nodes) < 2:
            return
        transpose = _only_user(_only_user(nodes[-1]))
        flatten = _only_user(transpose)
        x = self._first_convolutions(nodes[0], nodes[1], flatten)
        for node in nodes[2:]:
            weight, bias = self._convolution_weight(node), _present(node, node.inputs[2])
            window = _window(node)
            function = convolutions.int8_convolution(window.kernel, window.stride)
            x = self._inserted(function, node, [x, weight.weight, weight.scale, bias], flatten)
        flatten.replace_input_with(0, x)
        channels = _shape(_present(nodes[-1], nodes[-1].inputs[1]))[0]
        self._permute_projection(_only_user(flatten), channels)
        channel_axis = _present(nodes[0], nodes[0].inputs[0]).producer()
        with_relus = [part for node in reversed(nodes) for part in (_only_user(node), node)]
        self.graph.remove([transpose, *with_relus, *([channel_axis] if channel_axis else [])], safe=True)

    def _first_convolutions(self, first: ir.Node, second: ir.Node, before: ir.Node) -> ir.Value:
        weight, bias = _present(first, first.inputs[1]), _present(first, first.inputs[2])
        channels, inner, kernel, _ = _shape(weight)
        unsqueeze = _present(first, first.inputs[0]).producer()
        bins = self.graph.inputs[0].shape[-1] if self.graph.inputs[0].shape else None
        if inner != 1 or unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or not isinstance(bins, int):
            raise BundleError(f"node {first.name}: expected a convolution of features with one channel")

        def rows() -> Array:
            return np.vstack((_array(weight).reshape(channels, kernel**2).T, _array(bias)))

        name = f"{weight.name}.rows"
        first_weight = self._initializer(name, ir.DataType.FLOAT, (kernel**2 + 1, channels), rows)
        quantized = self._convolution_weight(second)
        function = convolutions.int8_first_convolutions(bins, channels, _window(first), _window(second))
        features, last = _present(unsqueeze, unsqueeze.inputs[0]), _present(second, second.inputs[2])
        inputs = [features, first_weight, quantized.weight, quantized.scale, last]
        return self._inserted(function, second, inputs, before)

    def _convolution_weight(self, node: ir.Node) -> _Quantized:
        """The weight of a convolution as [time * frequency * in, out]."""
        weight = _present(node, node.inputs[1])
        out, inner, kernel, _ = _shape(weight)
        return self._int8(
            weight, "subsampling", lambda: _array(weight).transpose(2, 3, 1, 0).reshape(kernel**2 * inner, out)
        )

    def _inserted(self, function: ir.Function, near: ir.Node, inputs: Sequence[ir.Value], before: ir.Node) -> ir.Value:
        """The output of a new call of `function`, named after the scope of the node `near`."""
        call = self._new_call(function, near, inputs)
        call.outputs[0].name = call.name
        self.graph.insert_before(before, call)
        return call.outputs[0]

    def _permute_projection(self, node: ir.Node, channels: int) -> None:
        """Quantize the projection of the front end, its rows in the order [frequency, channel]."""
        weight = _present(node, node.inputs[1])
        if node.op_type != "MatMul" or contract.weight_group(weight.name or "") != "subsampling":
            raise BundleError(f"node {node.name}: found {node.op_type}, expected the projection of the front end")

        def rows() -> Array:
            array = _array(weight)
            return array.reshape(channels, -1, array.shape[1]).swapaxes(0, 1).reshape(array.shape)

        self._product(node, _present(node, node.inputs[0]), self._int8(weight, "subsampling", rows), "relu")


def _activation(x: ir.Value) -> str | None:
    """The activation that gave x, if its lowest value is known and it ends in a node that tells."""
    node = x.producer()
    if node is None or node.op_type not in ("Relu", "Mul"):
        return None
    if node.op_type == "Relu":
        return "relu"
    gate = node.inputs[1].producer() if node.inputs[1] is not None else None
    is_swish = gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is node.inputs[0]
    return "swish" if is_swish else None


def _window(node: ir.Node) -> convolutions.Window:
    """Of a convolution, as its weight and strides have it."""
    kernel = _shape(_present(node, node.inputs[1]))[-1]
    return convolutions.Window(kernel=kernel, stride=int(node.attributes["strides"].as_ints()[0]))


def _array(value: ir.Value) -> Array:
    tensor = value.const_value
    if tensor is None:
        raise BundleError(f"weight {value.name}: has no value")
    if isinstance(tensor, ir.ExternalTensor):
        # a copy, so that the mapped file does not stay in memory weight after weight
        array = np.array(tensor.numpy(), np.float32)
        tensor.release()
        return array
    return np.asarray(tensor.numpy(), np.float32)


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.const_value is None:
        raise BundleError(f"weight {value.name}: has no value")
    return tuple(axis for axis in value.const_value.shape if isinstance(axis, int))


def _present(node: ir.Node, value: ir.Value | None) -> ir.Value:
    if value is None:
        raise BundleError(f"node {node.name}: an input is missing")
    return value


def _only_user(node: ir.Node) -> ir.Node:
    users = list(node.outputs[0].uses())
    if len(users) != 1:
        raise BundleError(f"node {node.name}: its output has {len(users)} readers, expected 1")
    return users[0].node


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.outputs[0].name = old.outputs[0].name
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0])
    graph.remove(old, safe=True)
