"""Layers for a chunk of one stream at fixed shapes, without operators that compilers for NPUs lack.

No axis is found out at run time, no tensor has more than four axes, and no number is too large for float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import END, FURTHEST_LEFT, FURTHEST_RIGHT, Heads, PositionUse, to_heads
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.convolution import OverTime
from u2moe.runtime.graph.layers import affine

SHARPNESS = 256.0
"""Factor of each step from a difference of logits to "chosen or not". Three steps tell 1e-6 apart, and no number is
larger than this one, so that float16 and int8 can hold them all."""
STEPS = 3
PENALTY = 16.0
"""Taken from the logits of experts that are not chosen: their shares are below 2e-7."""


@dataclass(frozen=True, kw_only=True)
class FixedHeads(Heads):
    """Heads that attend to a cache of fixed size and to the chunk after it.

    Attributes:
        past: frames of the cache; `time`: of the chunk.
    """

    past: int
    time: int

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
        """As `cached_attention`, with the cache of this block [1, kv_heads, past, 2 * size].

        Returns the context, and keys and values of the chunk as they are cached [1, kv_heads, kept, 2 * size].
        """
        own = to_heads(g, key_value, self.num_kv_heads, 2 * self.size)
        both = g.op("Concat", past, own, axis=2)
        kept = g.op("Slice", own, [self.time - self.past], [END], [2]) if self.time > self.past else own
        return self.context(g, query, both, bias, use, positions), kept

    def scores_of_distances(
        self,
        g: GraphBuilder,
        queries: ir.Value,
        keys: ir.Value,  # noqa: ARG002 - their number is known
        vectors: ir.Value,
    ) -> ir.Value:
        """See `Heads`: the vectors of all pairs of a query and a key are a constant."""
        places = np.arange(self.past + self.time) - (self.past + np.arange(self.time))[:, np.newaxis]
        rows = np.clip(places, -FURTHEST_LEFT, FURTHEST_RIGHT) + FURTHEST_LEFT
        located = g.op("Unsqueeze", g.op("Transpose", g.op("Gather", vectors, rows), perm=[0, 2, 1]), [1])
        by_query = g.op("MatMul", g.op("Transpose", queries, perm=[2, 0, 1, 3]), located)  # [time, 1, heads, keys]
        return g.op("Transpose", by_query, perm=[1, 2, 0, 3])

    def repeated(self, g: GraphBuilder, key_value: ir.Value) -> ir.Value:
        """See `Heads`."""
        heads = [key_value]
        if self.num_kv_heads > 1:
            heads = list(g.ops("Split", key_value, [1] * self.num_kv_heads, axis=1, num_outputs=self.num_kv_heads))
        group = self.num_heads // self.num_kv_heads
        return g.op("Concat", *(head for head in heads for _ in range(group)), axis=1)


def fixed_convolution(
    g: GraphBuilder, form: OverTime, inputs: Sequence[ir.Value], past: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """As the function of `form` with a cache, whose inputs it has but for `past` [1, kernel - 1, channels].

    Returns what that does, and the last frames seen [1, kernel - 1, channels].
    """
    own = len(form.INPUTS)
    parameters = list(inputs[own + 2 :])
    seen = g.op("Concat", past, form.combined(g, list(inputs[:own])), axis=1)
    kept = g.op("Slice", seen, [1 - form.kernel], [END], [1])
    return form.convolved(g, seen, _shape(parameters[0])[0], parameters, 0), kept


def fixed_mixture(
    g: GraphBuilder, mixture: Mixture, x: ir.Value, gate: ir.Value, weights: Sequence[ir.Value]
) -> ir.Value:
    """A mixture of experts on [1, time, dim] whose experts are one wide layer; those not chosen get no share of it.

    `weights` are those of the experts in turn, as `float_mixture` takes them.
    """
    parts = 4 if mixture.bias else 2
    joined = [weights[part::parts] for part in range(parts)]
    first, second = joined[: parts // 2], joined[parts // 2 :]
    with g.scope("router"):
        share = _shares(g, mixture, g.op("MatMul", x, gate))
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
    if weight.shape is None:
        raise ValueError(f"weight {weight.name} has no shape")
    return tuple(weight.shape.numpy())


def _shares(g: GraphBuilder, mixture: Mixture, logits: ir.Value) -> ir.Value:
    """The weight of each expert, 0 for all but the best [1, time, experts]."""
    if mixture.top_k < mixture.num_experts:
        below = g.op("Sub", _least_chosen(g, mixture, logits), logits)  # above 0 for those that are not chosen
        for step in range(STEPS):
            most = PENALTY if step == STEPS - 1 else 1.0
            below = g.op("Mul", g.op("Clip", below, 0.0, most / SHARPNESS), SHARPNESS)
        logits = g.op("Sub", logits, below)
    return g.op("Softmax", logits, axis=-1)


def _least_chosen(g: GraphBuilder, mixture: Mixture, logits: ir.Value) -> ir.Value:
    """The logit of the last expert that is chosen [1, time, 1]: halves of the lanes are merged until one is left.

    `best` holds the best logits of each lane in descending order; a bitonic network merges those of two lanes.
    """
    lanes, most = 1 << (mixture.num_experts - 1).bit_length(), 1 << (mixture.top_k - 1).bit_length()
    if lanes > mixture.num_experts:  # more of the worst change nothing
        worst = g.op("ReduceMin", logits, [-1], keepdims=1)
        logits = g.op("Concat", logits, *[worst] * (lanes - mixture.num_experts), axis=-1)
    best = [logits]
    while lanes > 1:
        lanes //= 2
        halves = [g.ops("Split", each, [lanes] * 2, axis=-1, num_outputs=2) for each in best]
        one, other = [half[0] for half in halves], [half[1] for half in halves][::-1]
        if 2 * len(best) <= most:
            best = [*one, *other]
        else:
            best = [g.op("Max", *pair) for pair in zip(one, other, strict=True)]
        _sort(g, best)
    return best[mixture.top_k - 1]


def _sort(g: GraphBuilder, values: list[ir.Value]) -> None:
    """Sort a bitonic sequence in place, the largest first."""
    stride = len(values) // 2
    while stride:
        for index in range(len(values)):
            if not index & stride:
                pair = values[index], values[index + stride]
                values[index], values[index + stride] = g.op("Max", *pair), g.op("Min", *pair)
        stride //= 2
