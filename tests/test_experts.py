"""Mixtures of experts in every number format, compared with plain numpy token by token."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from quantized import IN_TORCH, LOWEST, rounded_rows

from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.formats import CONVERSIONS, conversion
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.graph.dispatch import float_mixture

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in plain numpy, token by token."""

    gate: np.ndarray
    top_k: int
    act: object
    weights: dict
    biases: dict
    """Weights by "w1" and "w2", [experts, out]."""
    least_hidden: float = 1e-20
    """Smallest peak with which the hidden activations of a token are rounded."""

    def shares(self, token):
        """Return the weight of each expert of a token, the most likely first."""
        logits = token @ self.gate
        chosen = np.argsort(-logits, kind="stable")[: self.top_k]
        shares = np.exp(logits[chosen] - logits.max())
        return dict(zip(chosen, shares / shares.sum(), strict=True))

    def said_of(self, tokens, *, rounded):
        """Compute [tokens, dim] for tokens of that shape, with exact or rounded activations."""
        rows = rounded_rows if rounded else lambda x, _=0: x
        result = np.zeros_like(tokens)
        for row, token in enumerate(tokens):
            for expert, share in self.shares(token).items():
                hidden = rows(token[np.newaxis])[0] @ self.weights[f"e{expert}_w1"] + self.biases["w1"][expert]
                hidden = self.act(torch.from_numpy(hidden.astype(np.float32))).numpy()[np.newaxis]
                hidden = rows(hidden, self.least_hidden)[0]
                result[row] += share * (hidden @ self.weights[f"e{expert}_w2"] + self.biases["w2"][expert])
        return result


LIMITS = {"fp32": 1e-5, "fp16": 3e-3, "int8": 3e-3, "int4": 1.5e-2}
"""Limit of the relative error of each format. An activation at the edge of rounding changes by 1/127 of its row's peak.
MatMulNBits rounds blocks of a row, which is finer."""
ROUND_ROWS = ("int8", "int4")
"""Formats whose products round activations."""
SIZES = [(8, 2), (4, 1), (3, 3), (1, 1)]
"""Numbers of experts, and of experts per token."""
CASES = [
    *itertools.product(WEIGHT_FORMATS, ["swish"], SIZES, [True, False]),
    *(("int8", kind, SIZES[0], True) for kind in IN_TORCH if kind != "swish"),
]


def test_every_format_has_a_limit():
    assert LIMITS.keys() == WEIGHT_FORMATS.keys() == CONVERSIONS.keys() | {"fp32", "fp16"}


@pytest.mark.parametrize(("kind", "activation", "size", "has_bias"), CASES)
def test_tokens_get_the_weighted_sum_of_their_experts(kind, activation, size, has_bias, session_of):
    """Experts differ so much that a wrong expert, a missing one or a wrong weight would show."""
    random, (dim, hidden), (num_experts, top_k) = np.random.default_rng(2), (32, 64), size
    gate = random.standard_normal((dim, num_experts)).astype(np.float32) * 0.3
    shapes = {"w1": (dim, hidden), "w2": (hidden, dim)}
    floats = {f"e{expert}_{part}": (random.standard_normal(shape) * (1 + expert)).astype(np.float32)
              for expert in range(num_experts) for part, shape in shapes.items()}  # fmt: skip
    biases = {part: has_bias * random.standard_normal((num_experts, shape[1])).astype(np.float32)
              for part, shape in shapes.items()}  # fmt: skip
    dtype = np.float16 if kind == "fp16" else np.float32
    made = conversion(kind, 16) if kind in CONVERSIONS else None
    mixture = Mixture(
        num_experts=num_experts, top_k=top_k, activation=activation, bias=has_bias, weights=kind,
        block_size=made.block_size if made else 0,
    )  # fmt: skip
    function = made.mixture(mixture, dim, hidden) if made else float_mixture(mixture)
    initial, restored = {"gate": gate, "w2_bias": biases["w2"]}, {}
    for name, weight in floats.items():
        expert, _, part = name.partition("_")
        initial[f"{name}_bias"] = biases[part][int(expert[1:])].astype(dtype)
        parts = made.parts(weight) if made else [weight.astype(dtype)]
        initial |= zip(made.names(name, bias=False) if made else [name], parts, strict=True)
        restored[name] = made.restored(parts, len(weight)) if made else weight
    initial = {value.name: initial[value.name] for value in list(function.inputs)[1:]}
    session = session_of([function], {"x": 3}, initial, dtype=dtype)
    x = random.standard_normal((2, 20, dim)).astype(dtype)
    x[0, 3] = 0  # all experts get the same weight
    found = session.run(None, {"x": x})[0]

    least_hidden = (LOWEST.get(activation, 0) if kind == "int8" else 0) or 1e-20
    layer = Experts(
        gate=gate, top_k=top_k, act=IN_TORCH[activation], weights=restored, biases=biases, least_hidden=least_hidden
    )
    tokens, rounded = x.reshape(-1, dim).astype(np.float32), kind in ROUND_ROWS
    assert relative_error(layer.said_of(tokens, rounded=rounded), found.reshape(-1, dim)) < LIMITS[kind]
    if top_k < num_experts:
        others = dataclasses.replace(layer, top_k=top_k + 1).said_of(tokens, rounded=rounded)
        assert relative_error(others, found.reshape(-1, dim)) > 2 * LIMITS[kind]
    alone = session.run(None, {"x": x[:, :4]})[0]
    np.testing.assert_allclose(
        alone, found[:, :4], rtol=0 if kind == "int8" else 1e-3, atol=0 if kind == "int8" else 1e-2
    )
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, dim)
