"""Sparse dispatch: a mixture of experts as a model-local function, for experts of any format.

Assignments of tokens to experts are sorted by expert. Each expert then processes its tokens as one matrix, and one
Gather puts all rows back in the order of tokens. An expert without tokens processes an empty matrix.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from u2moe.runtime.bundle.mixture import Mixture, read_mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import GraphBuilder, build_function
from u2moe.runtime.graph.layers import affine, halves


class SparseDispatch:
    """Nodes that send tokens to experts. A row is the assignment of a token to an expert; rows are sorted by expert."""

    def __init__(self, g: GraphBuilder, x: ir.Value, gate: ir.Value, mixture: Mixture) -> None:
        self.g, self.mixture, self.half = g, mixture, mixture.weights == "fp16"
        self.tokens = g.op("Flatten", x, axis=-1)  # inputs of the layer [tokens, dim]
        with g.scope("router"):  # in float32, even if the tokens are in float16
            single = g.op("Cast", self.tokens, to=ir.DataType.FLOAT) if self.half else self.tokens
            self.logits = g.op("MatMul", single, gate)  # [tokens, experts]
            # experts of each token [tokens, k], the most likely first, and their shares in the outputs, which sum to 1
            values, self.experts = g.ops("TopK", self.logits, [mixture.top_k], axis=-1, num_outputs=2)
            shares = g.op("Softmax", values, axis=-1)
            self.probabilities = g.op("Cast", shares, to=ir.DataType.FLOAT16) if self.half else shares
        with g.scope("dispatch"):  # sort the assignments of tokens by expert
            assignments = g.op("Reshape", self.experts, [-1])
            num_assignments = g.op("Shape", assignments)
            order = g.ops("TopK", assignments, num_assignments, axis=0, largest=0, num_outputs=2)[1]
            one_hot = g.op("OneHot", assignments, mixture.num_experts, [0, 1], axis=0)
            self.counts = g.op("ReduceSum", one_hot, [1], keepdims=0)  # number of rows of each expert [experts]
            position = g.ops("TopK", order, num_assignments, axis=0, largest=0, num_outputs=2)[1]
            self._places = g.op("Reshape", position, [-1, mixture.top_k])
            self.token = g.op("Div", order, mixture.top_k)  # index of the token of each row [rows]

    def gather(self, values: ir.Value) -> ir.Value:
        """Expand values of tokens [tokens, ...] to rows: each row gets the values of its token."""
        return self.g.op("Gather", values, self.token, axis=0)

    def split(self, rows: ir.Value) -> list[ir.Value]:
        """Split values of all rows [rows, ...] by expert."""
        return list(self.g.ops("Split", rows, self.counts, axis=0, num_outputs=self.mixture.num_experts))

    def merge(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Concatenate the rows of all experts. This is the inverse of `split`."""
        return self.g.op("Concat", *parts, axis=0)

    def of_tokens(self, rows: ir.Value) -> ir.Value:
        """Arrange values [rows, ...] by token: [tokens, k, ...]."""
        return self.g.op("Gather", rows, self._places, axis=0)

    def weigh(self, rows: ir.Value, factors: ir.Value | None = None) -> ir.Value:
        """Return the weighted sum [tokens, dim] of each token's rows. `factors` [tokens, k] default to `probabilities`.

        This is a vector-matrix product per token, which is faster than multiplying and then summing.
        """
        g = self.g
        weights = g.op("Unsqueeze", self.probabilities if factors is None else factors, [1])
        return g.op("Squeeze", g.op("MatMul", weights, self.of_tokens(rows)), [1])


Experts = Callable[[SparseDispatch, Sequence[ir.Value]], ir.Value]
"""Computes the weighted sum of the experts for each token [tokens, dim], given a dispatch and all experts' weights."""


def one_by_one(expert: Callable[[SparseDispatch, ir.Value, list[ir.Value]], ir.Value]) -> Experts:
    """Return a function that calls `expert` with a dispatch, the rows of each expert and its weights."""

    def experts(dispatch: SparseDispatch, weights: Sequence[ir.Value]) -> ir.Value:
        size, outputs = len(weights) // dispatch.mixture.num_experts, []
        for index, rows in enumerate(dispatch.split(dispatch.gather(dispatch.tokens))):
            with dispatch.g.scope(str(index)):
                outputs.append(expert(dispatch, rows, list(weights[index * size : (index + 1) * size])))
        return dispatch.weigh(dispatch.merge(outputs))

    return experts


def mixture_function(mixture: Mixture, parameters: Sequence[str], experts: Experts) -> ir.Function:
    """Build the function of a mixture of experts. Its inputs are x [..., dim], gate [dim, experts] and `parameters`."""

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
        x, gate, *weights = inputs
        dispatch = SparseDispatch(g, x, gate, mixture)
        with g.scope("experts"):
            summed = experts(dispatch, weights)
        return g.op("Reshape", summed, g.op("Shape", x), allowzero=1)

    return build_function(mixture.function, ["x", "gate", *parameters], body, mixture.attributes())


def float_mixture(mixture: Mixture) -> ir.Function:
    """Build the function of a mixture with float32 or float16 experts. Router and activations stay in float32."""

    def expert(dispatch: SparseDispatch, rows: ir.Value, own: list[ir.Value]) -> ir.Value:
        g, (first, second) = dispatch.g, halves(own)
        y = affine(g, rows, first)
        y = g.op("Cast", y, to=ir.DataType.FLOAT) if dispatch.half else y
        y = activation(g, y, mixture.activation)
        y = g.op("Cast", y, to=ir.DataType.FLOAT16) if dispatch.half else y
        return affine(g, y, second)

    parts = ("w1", "w1_bias", "w2", "w2_bias") if mixture.bias else ("w1", "w2")
    names = [f"e{number}_{part}" for number in range(mixture.num_experts) for part in parts]
    return mixture_function(mixture, names, one_by_one(expert))


def mixture_of(node: ir.Node) -> Mixture | None:
    """Return the mixture of experts that a node calls, or None; see `read_mixture`."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return read_mixture(node.domain, node.op_type, attributes)
