"""Model-local function that finds the shared prefixes of hypotheses, so that the decoder computes each prefix once."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from u2moe.runtime.graph.builder import GraphBuilder, build_function


class Prefixes(NamedTuple):
    """Unique prefixes of the hypotheses [batch, nbest, length], ordered by utterance.

    Attributes:
        ends: index, among all tokens, of each prefix's last token [prefixes].
        of_tokens: index of the prefix that ends with each token [batch, nbest, length]; any value for padding.
        of_utterances: indices of the prefixes of each utterance, padded with any value [batch, most]. `most` is the
            largest number of prefixes of an utterance.
        places: index of each prefix in the flattened `of_utterances` [prefixes].
    """

    ends: ir.Value
    of_tokens: ir.Value
    of_utterances: ir.Value
    places: ir.Value


def shared_prefixes() -> ir.Function:
    """Build a function that returns the `Prefixes` of `tokens` [batch, nbest, length].

    Its second input is `lens` [batch, nbest, 1], the number of valid tokens of each hypothesis minus 1.
    """

    def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
        tokens, lens = inputs

        def numbers(count: ir.Value) -> ir.Value:
            return g.op("Range", 0, g.op("Squeeze", count, [0]), 1)

        length, nbest = g.op("Shape", tokens, start=2), g.op("Shape", tokens, start=1, end=2)
        row = g.op("Unsqueeze", numbers(nbest), [1])
        exists = g.op("LessOrEqual", numbers(length), lens)
        differ = g.op("Not", g.op("Equal", g.op("Unsqueeze", tokens, [2]), g.op("Unsqueeze", tokens, [1])))
        num_different = g.op("CumSum", g.op("Cast", differ, to=ir.DataType.INT64), 3)
        is_equal = g.op("And", g.op("Equal", num_different, 0), g.op("Unsqueeze", exists, [1]))
        first = g.op("ArgMax", g.op("Cast", is_equal, to=ir.DataType.FLOAT), axis=2, keepdims=0)
        is_new = g.op("Cast", g.op("And", exists, g.op("Equal", first, row)), to=ir.DataType.INT64)
        flat = g.op("Reshape", is_new, [-1])
        ends = g.op("Reshape", g.op("NonZero", flat), [-1])
        place = g.op("Reshape", numbers(g.op("Shape", flat)), g.op("Shape", tokens))
        earlier = g.op("Mul", g.op("Sub", row, first), length)
        of_tokens = g.op("Gather", g.op("Sub", g.op("CumSum", flat, 0), 1), g.op("Sub", place, earlier))
        counts = g.op("ReduceSum", is_new, [1, 2], keepdims=0)
        begins = g.op("CumSum", counts, 0, exclusive=1)
        most, every = g.op("ReduceMax", counts, keepdims=1), numbers(g.op("Shape", ends))
        inside = g.op("Add", g.op("Unsqueeze", begins, [1]), numbers(most))
        of_utterances = g.op("Min", inside, g.op("Sub", g.op("Shape", ends), 1))
        utterance = g.op("Div", ends, g.op("Mul", nbest, length))
        places = g.op("Add", g.op("Mul", utterance, most), g.op("Sub", every, g.op("Gather", begins, utterance)))
        return [ends, of_tokens, of_utterances, places]

    return build_function("SharedPrefixes", ["tokens", "lens"], body)
