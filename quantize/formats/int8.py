"""Weights in int8 with one scale per column, and activations with one scale per token (row).

A token's result therefore does not depend on its chunk or batch. Rows are divided by their scales before they are
rounded, and products are multiplied by the scales. A row of zeros has scale 0. Its integers are meaningless, but their
product times 0 is the correct result.

Native kernels replace whole functions. If no other layer reads a product's input, one function quantizes the input,
multiplies it and adds the bias. A feed-forward layer, gated or not, is also one function.
"""

# ruff: noqa: ARG002 - products need only the sizes of their weights
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from u2moe.quantize import arithmetic
from u2moe.quantize.arithmetic import ACTIVATION_LEVELS, Float, Int8, int8_columns
from u2moe.quantize.formats.conversion import Inputs, Parts, Rounding, Sizes, WeightConversion
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.bundle.weight_formats import INT8
from u2moe.runtime.graph.activation import activation, lowest_of
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function
from u2moe.runtime.graph.dispatch import SparseDispatch, mixture_function
from u2moe.runtime.graph.layers import halves

ZERO = np.array(arithmetic.ACTIVATION_ZERO, np.uint8)
Rows = tuple[ir.Value, ir.Value]  # rows [..., in] as uint8, and the scale of each row [..., 1]


class Int8Conversion(WeightConversion):
    """Conversion to int8, stored as `arithmetic.Int8`."""

    form = INT8
    joins_biases = True

    def parts(self, weight: Float) -> Int8:
        """Return integers and scales that keep sums over row pairs within 16 bits; see `int8_columns`."""
        return int8_columns(weight)

    def stored(self, rows: int, columns: int) -> Sequence[tuple[ir.DataType, Sequence[int]]]:
        """See `WeightConversion`."""
        return [(ir.DataType.INT8, (rows, columns)), (ir.DataType.FLOAT, (columns,))]

    def restored(self, parts: Parts, rows: int) -> Float:
        """Return integers times scales."""
        integers, scale = parts
        return integers[:rows].astype(np.float32) * scale

    def rounding(self, weight: Float) -> Rounding:
        """See `WeightConversion`."""
        return _Int8Rounding(weight)

    def rows(self, after: str | None = None) -> ir.Function:
        """Build the function that quantizes x [..., in] once for several products; x may come `after` an activation."""
        attributes = {"activation": after or ""}
        return build_function("Int8Rows", ["x"], lambda g, inputs: _rows(g, inputs[0], after), attributes)

    def product_of_rows(self, *, bias: bool = False) -> ir.Function:
        """Build the function y = x @ weight + bias, for x quantized by the function that `rows` builds."""
        names = ["q", "row_scale", *self.names("weight", bias=bias, prefix="")]
        return build_function("Int8MatMul", names, lambda g, inputs: _product(g, (inputs[0], inputs[1]), inputs[2:]))

    def product(
        self, g: GraphBuilder, x: ir.Value, inputs: Inputs, shape: tuple[int, int], sizes: Sizes | None = None
    ) -> ir.Value:
        """Compute a product: quantize x as `rows` does, then multiply as `product_of_rows` does."""
        return _product(g, _rows(g, x, None), inputs)

    def linear(self, rows: int, columns: int, *, bias: bool, after: str | None = None) -> ir.Function:
        """Build the function y = x @ weight + bias, computed as in `product`."""
        names, attributes = self.names("weight", bias=bias, prefix=""), {"activation": after or ""}
        return self._function("Linear", names, lambda g, x: _product(g, _rows(g, x[0], after), x[1:]), attributes)

    def feed_forward(self, dim: int, hidden: int, kind: str, *, bias: bool, gated: bool) -> ir.Function:
        """Build a feed-forward layer that quantizes x and the hidden units, each once."""

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            x, *weights = inputs
            gate, (first, second) = weights[: 2 * gated], halves(weights[2 * gated :])
            rows = _rows(g, x, None)
            y = activation(g, _product(g, rows, gate or first), kind)
            if gated:
                y = g.op("Mul", y, _product(g, rows, first))
            return _product(g, _rows(g, y, None if gated else kind), second)

        return self._feed_forward(body, {"activation": kind, "bias": int(bias)}, bias=bias, gated=gated)

    def mixture(self, mixture: Mixture, dim: int, hidden: int) -> ir.Function:
        """Build a mixture. Its input `w2_bias`, if present, holds the second biases of all experts [experts, dim]."""
        return mixture_function(mixture, self.names_of_experts(mixture), _experts)

    def of_tables(self) -> WeightConversion:
        """Return the conversion of embedding tables, with one scale per token."""
        return _Int8Table()

    def embedding(self, dim: int) -> ir.Function:
        """Build a look-up in a table [vocab, dim] with a scale per row [vocab, 1]."""

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            weight, scale, tokens = inputs
            rows = g.op("Cast", g.op("Gather", weight, tokens, axis=0), to=ir.DataType.FLOAT)
            return g.op("Mul", rows, g.op("Gather", scale, tokens, axis=0))

        return build_function(self.form.function("Embedding"), ["weight", "scale", "tokens"], body)


class _Int8Table(Int8Conversion):
    """Conversion of a table [dim, vocab], stored as [vocab, dim]. Scales are those of `int8_rows`."""

    def parts(self, weight: Float) -> Int8:
        return Int8(*arithmetic.int8_rows(weight.T))

    def stored(self, rows: int, columns: int) -> Sequence[tuple[ir.DataType, Sequence[int]]]:
        return [(ir.DataType.INT8, (columns, rows)), (ir.DataType.FLOAT, (columns, 1))]

    def restored(self, parts: Parts, rows: int) -> Float:
        return super().restored(parts, len(parts[0])).T[:rows]


class _Int8Rounding(Rounding):
    num_rows = 64

    def __init__(self, weight: Float) -> None:
        self._scale = int8_columns(weight).scale
        self._integers = np.zeros(weight.shape, np.int8)

    def begin(self, rows: Float) -> None:
        """Do nothing: int8 rows share no parameters."""

    def restored(self, index: int, row: Float) -> Float:
        """Round a row to the nearest integers whose sums with the paired row stay within limits; see `int8_columns`."""
        other = self._integers[index - 1].astype(np.float32) if index % 2 else 0
        largest = arithmetic.WEIGHT_LEVELS
        nearest = np.clip(np.rint(row / self._scale), -largest, largest)
        self._integers[index] = np.clip(nearest, -largest - 1 - other, largest + 1 - other)
        return np.asarray(self._integers[index] * self._scale)

    def parts(self) -> Int8:
        return Int8(self._integers, self._scale)


def _rows(g: GraphBuilder, x: ir.Value, after: str | None) -> Rows:
    """Quantize rows with the scales in `Activation`: x = scale * (q - zero)."""
    lowest = lowest_of(after or "")
    peak = g.op("ReduceMax", g.op("Abs", x) if lowest is None else x, [-1], keepdims=1)
    if lowest:
        peak = g.op("Max", peak, lowest)
    scale = g.op("Mul", peak, 1 / ACTIVATION_LEVELS)
    return g.op("QuantizeLinear", g.op("Div", x, scale), 1.0, ZERO), scale


def _product(g: GraphBuilder, rows: Rows, inputs: Sequence[ir.Value]) -> ir.Value:
    (q, row_scale), (weight, scale, *biases) = rows, inputs
    y = g.op("Mul", _integer_product(g, q, weight, scale), row_scale)
    return g.op("Add", y, biases[0]) if biases else y


def _integer_product(g: GraphBuilder, q: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
    """Multiply rows by a weight, and apply the weight's column scales; row scales are applied later."""
    return g.op("MatMulIntegerToFloat", q, weight, 1.0, scale, ZERO, domain=CONTRIB)


def _experts(dispatch: SparseDispatch, weights: Sequence[ir.Value]) -> ir.Value:
    """Compute a mixture of experts. Tokens are quantized once, before they are sorted by expert.

    Hidden activations and their peaks are computed expert by expert, so that they fit in the cache. The scales of all
    experts are computed together: for the few tokens of a chunk, starting an operator takes longer than running it.
    The hidden rows' scales and the second products' biases are applied in the weighted sum over a token's experts.
    """
    g, mixture = dispatch.g, dispatch.mixture
    second_biases, weights = weights[: int(mixture.bias)], weights[int(mixture.bias) :]
    size = len(weights) // mixture.num_experts
    own = [weights[index : index + size] for index in range(0, len(weights), size)]

    scale, zero = _scales(g, g.op("ReduceMax", g.op("Abs", dispatch.tokens), [-1], keepdims=0))
    q = g.op("QuantizeLinear", dispatch.tokens, scale, zero, axis=0)
    rows = dispatch.split(dispatch.gather(q))
    columns = dispatch.split(g.op("Unsqueeze", dispatch.gather(scale), [-1]))
    hidden = [
        activation(g, _product(g, both, part[:-2]), mixture.activation)
        for both, part in zip(zip(rows, columns, strict=True), own, strict=True)
    ]
    scale, zero = _scales(g, _peaks(dispatch, hidden))
    parts = zip(hidden, dispatch.split(scale), dispatch.split(zero), own, strict=True)
    outputs = [
        _integer_product(g, g.op("QuantizeLinear", y, y_scale, y_zero, axis=0), *part[-2:])
        for y, y_scale, y_zero, part in parts
    ]
    factors = g.op("Mul", dispatch.probabilities, dispatch.of_tokens(scale))
    summed = dispatch.weigh(dispatch.merge(outputs), factors)
    if not second_biases:
        return summed
    nothing = g.op("ConstantOfShape", g.op("Shape", dispatch.logits), value=ir.tensor(np.zeros(1, np.float32)))
    probabilities = g.op("ScatterElements", nothing, dispatch.experts, dispatch.probabilities, axis=1)
    return g.op("Gemm", probabilities, *second_biases, summed)


def _peaks(dispatch: SparseDispatch, hidden: Sequence[ir.Value]) -> ir.Value:
    """Compute the largest magnitude of each row, for all experts.

    Before version 1.32, onnxruntime returns the row maxima of an empty matrix in the shape of the matrix. This result
    has no elements, so it adds nothing to the concatenated maxima of all experts.
    """
    g, lowest = dispatch.g, lowest_of(dispatch.mixture.activation)
    sizes = hidden if lowest is not None else [g.op("Abs", y) for y in hidden]
    peaks = dispatch.merge([g.op("ReduceMax", y, [-1], keepdims=0) for y in sizes])
    return g.op("Max", peaks, lowest) if lowest else peaks


def _scales(g: GraphBuilder, peaks: ir.Value) -> Rows:
    """Compute scales and zero points [rows] from each row's largest magnitude, `peaks`: x = scale * (q - zero)."""
    scale = g.op("Mul", peaks, 1 / ACTIVATION_LEVELS)
    return scale, g.op("Expand", ZERO, g.op("Shape", scale))
