"""Layers for one chunk of one stream. Shapes are fixed, and NPU compilers support all operators.

All axis sizes are known in advance, tensors have at most four axes, and all numbers fit into float16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import END, FURTHEST_LEFT, FURTHEST_RIGHT, Heads, PositionUse, to_heads
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.convolution import DepthwiseConvolution
from u2moe.runtime.graph.layers import affine, halves

SHARPNESS = 256.0
"""Factor by which each of `STEPS` steps multiplies a difference of logits. The steps turn a difference of at least 1e-6
into 1, and a negative one into 0. No number exceeds this factor, so all numbers fit into float16 and int8."""
STEPS = 3
PENALTY = 16.0  # subtracted from the logits of experts that are not chosen, so that their weights are less than 2e-7


@dataclass(frozen=True, kw_only=True)
class FixedHeads(Heads):
    """Heads that attend to a cache of fixed size and to the chunk after it."""

    past: int  # number of frames in the cache
    time: int  # number of frames in the chunk

    def attend(
        self,
        g: GraphBuilder,
        query: ir.Value,
        key_value: ir.Value,
        past: ir.Value,
        bias: ir.Value,
        use: PositionUse,
        positions: Sequence[ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        """Add nodes as in `cached_attention`. `past` is the cache of one block [1, kv_heads, past, 2 * size].

        Returns the context, and the chunk's newest keys and values, to be cached [1, kv_heads, kept, 2 * size].
        """
        own = to_heads(g, key_value, self.num_kv_heads, 2 * self.size)
        both = g.op("Concat", past, own, axis=2)
        kept = g.op("Slice", own, [self.time - self.past], [END], [2]) if self.time > self.past else own
        return self.context(g, query, both, bias, use, positions), kept

    def scores_of_distances(
        self,
        g: GraphBuilder,
        queries: ir.Value,
        keys: ir.Value,  # noqa: ARG002 - only the keys' number matters
        vectors: ir.Value,
    ) -> ir.Value:
        """See `Heads`. All distances are known in advance, so constant indices select the vectors."""
        places = np.arange(self.past + self.time) - (self.past + np.arange(self.time))[:, np.newaxis]
        rows = np.clip(places, -FURTHEST_LEFT, FURTHEST_RIGHT) + FURTHEST_LEFT
        located = g.op("Unsqueeze", g.op("Transpose", g.op("Gather", vectors, rows), perm=[0, 2, 1]), [1])
        by_query = g.op("MatMul", g.op("Transpose", queries, perm=[2, 0, 1, 3]), located)  # [time, 1, heads, keys]
        return g.op("Transpose", by_query, perm=[1, 2, 0, 3])

    def repeated(self, g: GraphBuilder, key_value: ir.Value) -> ir.Value:
        """See `Heads`."""
        number = self.num_kv_heads
        heads = g.ops("Split", key_value, [1] * number, axis=1, num_outputs=number) if number > 1 else [key_value]
        return g.op("Concat", *(head for head in heads for _ in range(self.num_heads // number)), axis=1)


def fixed_convolution(
    g: GraphBuilder, form: DepthwiseConvolution, inputs: Sequence[ir.Value], past: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Add nodes equivalent to the `cached` function of the layer `form`.

    `inputs` are the inputs of that function, but `past` [1, kernel - 1, channels] replaces `cache` and `block`. Returns
    the output of that function and the last input frames [1, kernel - 1, channels].
    """
    own, parameters = list(inputs[: len(form.INPUTS)]), list(inputs[len(form.INPUTS) + 2 :])
    seen = g.op("Concat", past, form.combined(g, own), axis=1)
    kept = g.op("Slice", seen, [1 - form.kernel], [END], [1])
    return form.convolved(g, seen, _shape(parameters[0])[0], parameters, 0), kept


def fixed_mixture(
    g: GraphBuilder, mixture: Mixture, x: ir.Value, gate: ir.Value, weights: Sequence[ir.Value]
) -> ir.Value:
    """Add a mixture on [1, time, dim] as one wide layer of all experts. `weights` are as in `float_mixture`."""
    parts = 4 if mixture.bias else 2
    first, second = halves([weights[part::parts] for part in range(parts)])
    with g.scope("router"):
        share = _shares(g, mixture, x, gate)
    with g.scope("experts"):
        wide = [g.op("Concat", *each, axis=1 - index) for index, each in enumerate(first)]
        hidden = activation(g, affine(g, x, wide), mixture.activation)
        spread = np.repeat(np.eye(mixture.num_experts, dtype=np.float32), _shape(first[0][0])[1], axis=1)
        weighed = g.op("Mul", hidden, g.op("MatMul", share, g.constant(spread)))
        y = g.op("MatMul", weighed, g.op("Concat", *second[0], axis=0))
        if mixture.bias:
            rows = [g.op("Unsqueeze", bias, [0]) for bias in second[1]]
            y = g.op("Add", y, g.op("MatMul", share, g.op("Concat", *rows, axis=0)))
        return y


def _shape(weight: ir.Value) -> tuple[int, ...]:
    return tuple(ir.Shape(weight.shape or ()).numpy())


def _shares(g: GraphBuilder, mixture: Mixture, x: ir.Value, gate: ir.Value) -> ir.Value:
    """Return the routing weight of each expert [1, time, experts], nearly 0 for experts that are not chosen.

    The mean of all logits does not affect the weights, so it is removed. Logits are not compared with each other,
    because float16 rounds logits of about 4 to multiples of 0.004. Instead, x is multiplied by the difference of two
    experts' gate columns, because float16 keeps the sign of a small product.
    """
    gate, num = g.op("Sub", gate, g.op("ReduceMean", gate, [-1], keepdims=1)), mixture.num_experts
    logits = g.op("MatMul", x, gate)
    if mixture.top_k < num:
        each = np.eye(num, dtype=np.float32)
        pairs = np.tile(each, num) - np.repeat(each, num, axis=1)  # column num * i + j: logit of j minus logit of i
        above = g.op("MatMul", x, g.op("MatMul", gate, g.constant(pairs)))
        for _ in range(STEPS):
            above = g.op("Mul", g.op("Clip", above, 0.0, 1 / SHARPNESS), SHARPNESS)
        better = g.op("MatMul", above, g.constant(np.repeat(each, num, axis=0)))  # number of experts above each one
        late = g.op("Clip", g.op("Sub", better, float(mixture.top_k - 1)), 0.0, 1.0)
        logits = g.op("Sub", logits, g.op("Mul", late, PENALTY))
    return g.op("Softmax", logits, axis=-1)
