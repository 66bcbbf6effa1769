"""Products of a graph as integer products, with what stands before and after them in the same function."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from u2moe.quantize.passes.rewrite import new_call, present, replace
from u2moe.quantize.token_scales import (
    int8_feed_forward,
    int8_gated_feed_forward,
    int8_linear,
    int8_matmul,
    int8_rows,
)
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
        """Replace all products of a layer and everything between and after them by one call."""
        *firsts, second = layer.products
        inputs = [present(firsts[0], 0)]
        for weight, biases in zip(weights, layer.biases, strict=True):
            inputs += [weight.weight, weight.scale, *biases]
        bias = bool(layer.biases[-1])
        made = int8_gated_feed_forward if len(firsts) > 1 else int8_feed_forward
        function, attributes = made(layer.kind, bias=bias), {"activation": layer.kind, "bias": int(bias)}
        between = _between(firsts, second)
        self._replace(second, layer.end, new_call(self.model, function, second, inputs, attributes))
        self.model.graph.remove(between, safe=True)

    def _replace(self, node: ir.Node, end: ir.Node, call: ir.Node) -> None:
        replace(self.model.graph, end, call)
        if end is not node:
            self.model.graph.remove(node, safe=True)


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A feed-forward layer in float32: two products with an activation between them, and both or none with a bias.

    In a gated layer the activation is that of a third product, the gate, without a bias; it multiplies the first.

    Attributes:
        products: the MatMul nodes: the gate, if there is one, the first and the second.
        biases: the bias of each product, if it has one.
        end: the last node, which is the second product without a bias.
        kind: the activation.
    """

    products: Sequence[ir.Node]
    biases: Sequence[Sequence[ir.Value]]
    end: ir.Node
    kind: str


def feed_forward_of(second: ir.Node) -> FeedForward | None:
    """The feed-forward layer that ends with the product `second`, if nothing else reads what is inside."""
    hidden = present(second, 0)
    kind, activated = activation_of(hidden)
    products = [_product_before(activated)]
    product_of_both = hidden.producer()
    if kind is None and product_of_both is not None and product_of_both.op_type == "Mul":
        gate, other = (present(product_of_both, index) for index in range(2))
        kind, activated = activation_of(gate)
        products = [_product_before(activated), _product_before(other)]
    firsts = [product for product in products if product is not None]
    if kind is None or len(firsts) < len(products):
        return None
    ends, biases = zip(*(bias_after(product) for product in [*firsts, second]), strict=True)
    inside = {*_between(firsts, second), second}
    is_closed = all(use.node in inside for node in inside - {second} for use in node.outputs[0].uses())
    is_gate_plain = len(firsts) == 1 or not biases[0]
    if not is_closed or not is_gate_plain or bool(biases[-2]) != bool(biases[-1]) or not _fit(firsts, second):
        return None
    return FeedForward(products=[*firsts, second], biases=biases, end=ends[-1], kind=kind)


def _product_before(x: ir.Value) -> ir.Node | None:
    """The MatMul that gives x, with or without a bias."""
    node = x.producer()
    if node is not None and node.op_type == "Add":
        node = present(node, 0).producer()
    is_product = node is not None and node.op_type == "MatMul" and bias_after(node)[0].outputs[0] is x
    return node if is_product else None


def _fit(firsts: Sequence[ir.Node], second: ir.Node) -> bool:
    """Whether the first products read the same rows, and the result has as many columns as these."""
    dim, out = (present(node, 1).shape for node in (firsts[0], second))
    is_square = dim is not None and out is not None and dim[0] == out[1]
    return is_square and all(
        present(node, 0) is present(firsts[0], 0) and present(node, 1).shape == dim for node in firsts
    )


def _between(firsts: Collection[ir.Node], second: ir.Node) -> list[ir.Node]:
    """The nodes from `firsts` to `second`, without the latter, last first."""
    found: dict[ir.Node, None] = {}
    waiting = [second.inputs[0]]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None:
            found[node] = None
            waiting += [] if node in firsts else list(node.inputs)
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
