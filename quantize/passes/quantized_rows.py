"""Products of a graph as integer products, with what stands before and after them in the same function."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from u2moe.quantize.passes.rewrite import new_call, present, replace
from u2moe.quantize.token_scales import int8_feed_forward, int8_linear, int8_matmul, int8_rows
from u2moe.quantize.weights import Quantized


class QuantizedRows:
    """Replaces products. Rows that several of them read are quantized once for all.

    Args:
        model: the graph, changed in place.
        nodes: the MatMul nodes that will be replaced.
    """

    def __init__(self, model: ir.Model, nodes: Collection[ir.Node]) -> None:
        self.model = model
        self.rows: dict[ir.Value, Sequence[ir.Value]] = {}
        """Integers and largest magnitudes."""
        self._nodes = set(nodes)

    def multiply(self, node: ir.Node, weight: Quantized, kind: str | None) -> None:
        """Replace the MatMul `node`, and its bias; `kind` is the activation that its rows come from."""
        x = present(node, 0)
        end, biases = bias_after(node)
        if x not in self.rows and sum(use.node in self._nodes for use in x.uses()) == 1:
            inputs, attributes = [x, weight.weight, weight.scale, *biases], {"activation": kind or ""}
            self._replace(
                node, end, new_call(self.model, int8_linear(kind, bias=bool(biases)), node, inputs, attributes)
            )
            return
        if x not in self.rows:
            call = new_call(self.model, int8_rows(kind), node, [x], {"activation": kind or ""})
            for output, part in zip(call.outputs, ("q", "peak"), strict=True):
                output.name = f"{call.name}/{part}"
            self.model.graph.insert_before(node, call)
            self.rows[x] = call.outputs
        inputs = [*self.rows[x], weight.weight, weight.scale, *biases]
        self._replace(node, end, new_call(self.model, int8_matmul(bias=bool(biases)), node, inputs))

    def feed_forward(self, layer: FeedForward, weights: Sequence[Quantized]) -> None:
        """Replace two products and everything between and after them by one call."""
        inputs = [present(layer.first, 0)]
        for weight, biases in zip(weights, (layer.first_biases, layer.second_biases), strict=True):
            inputs += [weight.weight, weight.scale, *biases]
        bias = bool(layer.first_biases)
        function, attributes = int8_feed_forward(layer.kind, bias=bias), {"activation": layer.kind, "bias": int(bias)}
        between = _between(layer.first, layer.second)
        self._replace(layer.second, layer.end, new_call(self.model, function, layer.second, inputs, attributes))
        self.model.graph.remove(between, safe=True)

    def _replace(self, node: ir.Node, end: ir.Node, call: ir.Node) -> None:
        replace(self.model.graph, end, call)
        if end is not node:
            self.model.graph.remove(node, safe=True)


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A feed-forward layer in float32: two products with an activation between them, and both or none with a bias.

    Attributes:
        first: the first MatMul; `second`: the second.
        end: the last node, which is `second` without a bias.
        kind: the activation.
        first_biases: the first bias, if there is one; `second_biases`: the second.
    """

    first: ir.Node
    second: ir.Node
    end: ir.Node
    kind: str
    first_biases: Sequence[ir.Value]
    second_biases: Sequence[ir.Value]


def feed_forward_of(second: ir.Node) -> FeedForward | None:
    """The feed-forward layer that ends with the product `second`, if nothing else reads what is inside."""
    kind, hidden = activation_of(present(second, 0))
    first = hidden.producer()
    if first is not None and first.op_type == "Add":
        first = present(first, 0).producer()
    if kind is None or first is None or first.op_type != "MatMul":
        return None
    first_end, first_biases = bias_after(first)
    end, second_biases = bias_after(second)
    inside = {*_between(first, second), second}
    is_closed = all(use.node in inside for node in inside - {second} for use in node.outputs[0].uses())
    dim, out = (present(node, 1).shape for node in (first, second))
    is_square = dim is not None and out is not None and dim[0] == out[1]
    if first_end.outputs[0] is not hidden or not is_closed or not is_square:
        return None
    if bool(first_biases) != bool(second_biases):
        return None
    return FeedForward(
        first=first, second=second, end=end, kind=kind, first_biases=first_biases, second_biases=second_biases
    )


def _between(first: ir.Node, second: ir.Node) -> list[ir.Node]:
    """The nodes from `first` to `second`, without the latter, last first."""
    found: dict[ir.Node, None] = {}
    waiting = [second.inputs[0]]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None:
            found[node] = None
            waiting += [] if node is first else list(node.inputs)
    return list(found)


def bias_after(node: ir.Node) -> tuple[ir.Node, list[ir.Value]]:
    """The addition of a constant vector that alone reads the output of a node, and this vector; or node itself."""
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Add":
        x, bias = readers[0].inputs
        if (
            x is node.outputs[0]
            and bias is not None
            and bias.const_value is not None
            and len(bias.const_value.shape) == 1
        ):
            return readers[0], [bias]
    return node, []


def activation_of(x: ir.Value) -> tuple[str | None, ir.Value]:
    """The activation that x comes from, one of `ACTIVATIONS`, and its input; or None and x."""
    node = x.producer()
    if node is None:
        return None, x
    if node.op_type in _SINGLE:
        return _SINGLE[node.op_type], present(node, 0)
    if node.op_type == "Mul":
        left, right = present(node, 0), present(node, 1).producer()
        if right is not None and right.op_type == "Sigmoid" and right.inputs[0] is left:
            return "swish", left
        half = left.producer()
        if half is not None and half.op_type == "Mul" and right is not None and _is_gelu(present(half, 0), right):
            return "gelu", present(half, 0)
    return None, x


_SINGLE: Mapping[str, str] = MappingProxyType({"Relu": "relu", "Tanh": "tanh", "Selu": "selu", "Clip": "hardtanh"})


def _is_gelu(x: ir.Value, plus_one: ir.Node) -> bool:
    """Whether a node is erf(x / constant) + 1."""
    erf = plus_one.inputs[0].producer() if plus_one.op_type == "Add" and plus_one.inputs[0] is not None else None
    quotient = erf.inputs[0].producer() if erf is not None and erf.op_type == "Erf" and erf.inputs[0] else None
    return quotient is not None and quotient.op_type == "Div" and quotient.inputs[0] is x
