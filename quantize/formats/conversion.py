"""Interface of a weight format: how weights are converted, stored, rounded row by row, and multiplied in graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from u2moe.quantize.arithmetic import Array, Float
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.bundle.weight_formats import WeightFormat
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import Body, GraphBuilder, build_function
from u2moe.runtime.graph.dispatch import SparseDispatch, mixture_function, one_by_one
from u2moe.runtime.graph.layers import halves

Parts = Sequence[Array]  # stored parts of a weight: the integers and their factors
Inputs = Sequence[ir.Value]  # the parts of a weight and any bias, in a graph
Sizes = Mapping[str, Any]  # attributes of a function


class Rounding(ABC):
    """A weight [in, out] that is rounded row by row. Until a row is rounded, it may still change."""

    num_rows: int  # maximum number of rows per call of `begin`

    @abstractmethod
    def begin(self, rows: Float) -> None:
        """Compute the parameters that the next rows share. `rows` [num_rows or fewer, out]: their current values."""

    @abstractmethod
    def restored(self, index: int, row: Float) -> Float:
        """Round row `index`; return the weights that its integers represent."""

    @abstractmethod
    def parts(self) -> Parts:
        """Return the stored parts of the rounded weight."""


@dataclass(frozen=True)
class WeightConversion(ABC):
    """Conversion of weights and layers to one format."""

    form: ClassVar[WeightFormat]
    others: ClassVar[tuple[str, ...]] = ("scale",)  # name suffixes of the parts that are stored with the integers
    joins_biases: ClassVar[bool] = False  # whether a mixture has one input for the second biases of all its experts
    block_size: int = 0  # number of rows that share a step; 0: rows share no steps

    @abstractmethod
    def parts(self, weight: Float) -> Parts:
        """Return the stored parts of a weight [in, out], each number rounded to the nearest value of the format."""

    @abstractmethod
    def stored(self, rows: int, columns: int) -> Sequence[tuple[ir.DataType, Sequence[int]]]:
        """Return the type and shape of each part of a weight [rows, columns]."""

    @abstractmethod
    def restored(self, parts: Parts, rows: int) -> Float:
        """Return the weights [rows, out] that the parts represent."""

    @abstractmethod
    def rounding(self, weight: Float) -> Rounding:
        """Return an object that rounds a weight [in, out] row by row, with the column scales of `parts`."""

    @abstractmethod
    def product(
        self, g: GraphBuilder, x: ir.Value, inputs: Inputs, shape: tuple[int, int], sizes: Sizes | None = None
    ) -> ir.Value:
        """Compute y = x @ weight + bias; `inputs` has the weight's parts and any bias.

        `sizes` contains K, N and block_size if they are attributes of the function being built.
        """

    def names(self, weight: str, *, bias: bool, prefix: str | None = None) -> list[str]:
        """Return input names: `weight` for the integers; others begin with `prefix` (None: with `weight` and "_")."""
        own = f"{weight}_" if prefix is None else prefix
        return [weight, *(f"{own}{part}" for part in self.others), *[f"{own}bias"] * bias]

    def linear(self, rows: int, columns: int, *, bias: bool, after: str | None = None) -> ir.Function:  # noqa: ARG002
        """Build the function y = x @ weight + bias; `after` is the activation that x comes from, if known.

        Products of all sizes share the function, which reads the sizes from attributes.
        """
        attributes = {"in": rows, "out": columns, "block_size": self.block_size}
        names = zip(("K", "N", "block_size"), attributes, strict=True)
        sizes = {name: ir.RefAttr(name, attribute, ir.AttributeType.INT) for name, attribute in names}

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            return self.product(g, inputs[0], inputs[1:], (rows, columns), sizes)

        return self._function("Linear", self.names("weight", bias=bias, prefix=""), body, attributes)

    def feed_forward(self, dim: int, hidden: int, kind: str, *, bias: bool, gated: bool) -> ir.Function:
        """Build y = h @ w2 + w2_bias, where h = activation(x @ w1 + w1_bias). `kind` names the activation.

        In gated layers, h = activation(x @ gate) * (x @ w1 + w1_bias).
        """

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            x, *weights = inputs
            size = (1 + len(self.others)) * gated
            gate, (first, second) = weights[:size], halves(weights[size:])
            y = self.product(g, x, first, (dim, hidden))
            if gated:
                y = g.op("Mul", activation(g, self.product(g, x, gate, (dim, hidden)), kind), y)
            else:
                y = activation(g, y, kind)
            return self.product(g, y, second, (hidden, dim))

        attributes = {"activation": kind, "bias": int(bias), "in": dim, "block_size": self.block_size}
        return self._feed_forward(body, attributes, bias=bias, gated=gated)

    def _feed_forward(self, body: Body, attributes: Sizes, *, bias: bool, gated: bool) -> ir.Function:
        gate = self.names("gate", bias=False) * gated
        names = [*gate, *self.names("w1", bias=bias), *self.names("w2", bias=bias)]
        return self._function("GatedFeedForward" if gated else "FeedForward", names, body, attributes)

    def _function(self, layer: str, names: Sequence[str], body: Body, attributes: Sizes) -> ir.Function:
        return build_function(self.form.function(layer), ["x", *names], body, attributes)

    def mixture(self, mixture: Mixture, dim: int, hidden: int) -> ir.Function:
        """Build the function of a mixture with these sizes. Its inputs after the router are the experts' weights."""

        def expert(dispatch: SparseDispatch, rows: ir.Value, own: list[ir.Value]) -> ir.Value:
            g, (first, second) = dispatch.g, halves(own)
            y = activation(g, self.product(g, rows, first, (dim, hidden)), mixture.activation)
            return self.product(g, y, second, (hidden, dim))

        return mixture_function(mixture, self.names_of_experts(mixture), one_by_one(expert))

    def names_of_experts(self, mixture: Mixture) -> list[str]:
        """Return the names of the inputs that follow the router in a mixture function."""
        second = mixture.bias and not self.joins_biases
        parts = [*self.names("w1", bias=mixture.bias), *self.names("w2", bias=second)]
        names = [f"e{expert}_{part}" for expert in range(mixture.num_experts) for part in parts]
        return [*["w2_bias"] * (mixture.bias and self.joins_biases), *names]

    def of_tables(self) -> WeightConversion:
        """Return the conversion of embedding tables [dim, vocab], in which each column belongs to a token."""
        return self

    def embedding(self, dim: int) -> ir.Function:
        """Build a function that looks up tokens [batch, length] in a table that `of_tables` converted."""
        raise NotImplementedError(f"{self.form.name} cannot store embeddings, got one of dimension {dim}")
