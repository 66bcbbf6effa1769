"""Weights in 4 bits, with one step per block of rows (MatMulNBits).

MatMulNBits rounds each row of activations to int8 separately, in blocks, so that a token's result depends only on the
token. Native kernels round each row to int8 with a single scale.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize import arithmetic
from u2moe.quantize.arithmetic import Float, Int4
from u2moe.quantize.formats.conversion import Inputs, Parts, Rounding, Sizes, WeightConversion
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_function


class Int4Conversion(WeightConversion):
    """Conversion to 4-bit weights, stored as `arithmetic.Int4`."""

    form = WEIGHT_FORMATS["int4"]
    others = ("steps", "scale")

    def parts(self, weight: Float) -> Int4:
        """Return the parts of a weight; the last block is padded with zeros."""
        return arithmetic.int4_blocks(weight, self.block_size)

    def stored(self, rows: int, columns: int) -> Sequence[tuple[ir.DataType, Sequence[int]]]:
        """See `WeightConversion`."""
        blocks = -(-rows // self.block_size)
        integers = ir.DataType.UINT8, (columns, blocks, self.block_size // 2)
        return [integers, (ir.DataType.UINT8, (columns, blocks)), (ir.DataType.FLOAT, (columns,))]

    def restored(self, parts: Parts, rows: int) -> Float:
        """Return the weights as MatMulNBits computes them."""
        return arithmetic.from_int4_blocks(Int4(*parts), rows)

    def rounding(self, weight: Float) -> Rounding:
        """Return an object that rounds row by row, with the column scales of `parts`; its `begin` sets the steps."""
        return _Int4Rounding(weight, self.block_size)

    def product(
        self, g: GraphBuilder, x: ir.Value, inputs: Inputs, shape: tuple[int, int], sizes: Sizes | None = None
    ) -> ir.Value:
        """Compute y = x @ weight + bias. If onnxruntime computes it, weight, steps and scale must be constants."""
        weight, steps, scale, *biases = inputs
        rows, columns = shape
        is_odd = bool(-(-rows // self.block_size) % 2)
        given = sizes or {"K": rows, "N": columns, "block_size": self.block_size}
        others = _scales_and_zeros(g, steps, scale, is_odd=is_odd)
        y = g.op("MatMulNBits", x, weight, *others, domain=CONTRIB, **given, bits=4, accuracy_level=4)
        return g.op("Add", y, biases[0]) if biases else y

    def embedding(self, dim: int) -> ir.Function:
        """Build a function that returns, for tokens [...], their columns of a weight [dim, vocab]."""

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> ir.Value:
            weight, steps, scale, tokens = inputs
            digits = [g.op("Unsqueeze", part, [-1]) for part in _nibbles(g, g.op("Gather", weight, tokens, axis=0))]
            both = _nibbles(g, g.op("Gather", steps, tokens, axis=0))
            step, zero = (g.op("Unsqueeze", part, [-1, -2]) for part in both)
            factors = g.op("Mul", step, g.op("Unsqueeze", g.op("Gather", scale, tokens, axis=0), [-1, -2, -3]))
            blocks = g.op("Mul", g.op("Sub", g.op("Concat", *digits, axis=-1), zero), factors)
            width = -(-dim // self.block_size) * self.block_size
            rows = g.op("Reshape", blocks, g.op("Concat", g.op("Shape", tokens), [width], axis=0))
            return g.op("Slice", rows, [0], [dim], [-1])

        names = [*self.names("weight", bias=False, prefix=""), "tokens"]
        attributes = {"dim": dim, "block_size": self.block_size}
        return build_function(self.form.function("Embedding"), names, body, attributes)


class _Int4Rounding(Rounding):
    def __init__(self, weight: Float, block_size: int) -> None:
        self.num_rows = block_size
        self._scale = arithmetic.int4_scale(weight, block_size)
        self._integers = np.zeros(weight.shape, np.uint8)
        self._steps: list[npt.NDArray[np.uint8]] = []

    def begin(self, rows: Float) -> None:
        self._steps.append(arithmetic.int4_steps(rows.T, self._scale))

    def restored(self, index: int, row: Float) -> Float:
        self._integers[index] = arithmetic.int4_integers(row, self._scale, self._steps[-1])
        return arithmetic.restored_int4(self._integers[index], self._scale, self._steps[-1])

    def parts(self) -> Int4:
        packed = arithmetic.packed_int4(arithmetic.blocks_of(self._integers, self.num_rows))
        return Int4(packed, np.stack(self._steps, axis=1), self._scale)


def _scales_and_zeros(g: GraphBuilder, steps: ir.Value, scale: ir.Value, *, is_odd: bool) -> list[ir.Value]:
    """Compute the scales and zero points of all blocks. Two zero points are packed into each byte."""
    # onnxruntime folds this computation into constants when it loads the graph. It would not fold DequantizeLinear.
    factors = g.op("Cast", g.op("BitwiseAnd", steps, np.array(15, np.uint8)), to=ir.DataType.FLOAT)
    scales = g.op("Mul", factors, g.op("Unsqueeze", scale, [-1]))
    zeros = g.op("BitShift", steps, np.array(4, np.uint8), direction="RIGHT")
    if is_odd:
        zeros = g.op("Pad", zeros, [0, 0, 0, 1], np.array(0, np.uint8))
    pairs = g.op("Reshape", zeros, [-1, 2])
    bytes_ = g.op("Cast", g.op("MatMulInteger", pairs, np.array([[1], [16]], np.uint8)), to=ir.DataType.UINT8)
    return [g.op("Reshape", scales, [-1]), g.op("Reshape", bytes_, [-1])]


def _nibbles(g: GraphBuilder, both: ir.Value) -> list[ir.Value]:
    """Compute the low and the high 4 bits of bytes, as float32."""
    low = g.op("BitwiseAnd", both, np.array(15, np.uint8))
    high = g.op("BitShift", both, np.array(4, np.uint8), direction="RIGHT")
    return [g.op("Cast", part, to=ir.DataType.FLOAT) for part in (low, high)]
