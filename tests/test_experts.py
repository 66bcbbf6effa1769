"""Mixtures of experts in every number format, against plain numpy, token by token."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from quantized import ACTIVATIONS, rounded_rows

from u2moe.quantize.arithmetic import (
    LOWEST,
    from_int4_blocks,
    int4_blocks,
    int8_columns,
    relative_error,
)
from u2moe.quantize.experts.int4 import int4_mixture
from u2moe.quantize.experts.int8 import int8_mixture
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.mixture import float_mixture

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in plain numpy, token by token."""

    gate: np.ndarray
    top_k: int
    act: object
    weights: dict
    biases: dict
    """By "w1" and "w2", [experts, out]."""
    least_hidden: float = 1e-20
    """The smallest peak that the hidden activations of a token are rounded with."""

    def shares(self, token):
        """The weight of each expert of a token, most likely first."""
        logits = token @ self.gate
        chosen = np.argsort(-logits, kind="stable")[: self.top_k]
        shares = np.exp(logits[chosen] - logits.max())
        return dict(zip(chosen, shares / shares.sum(), strict=True))

    def said_of(self, tokens, *, rounded):
        """[tokens, dim] for tokens of that shape; with activations as they are, or rounded to integers."""
        rows = rounded_rows if rounded else lambda x, _=0: x
        result = np.zeros_like(tokens)
        for row, token in enumerate(tokens):
            for expert, share in self.shares(token).items():
                hidden = rows(token[np.newaxis])[0] @ self.weights[f"e{expert}_w1"] + self.biases["w1"][expert]
                hidden = self.act(torch.from_numpy(hidden.astype(np.float32))).numpy()[np.newaxis]
                hidden = rows(hidden, self.least_hidden)[0]
                result[row] += share * (hidden @ self.weights[f"e{expert}_w2"] + self.biases["w2"][expert])
        return result


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int4"])
def test_tokens_get_the_weighted_sum_of_their_experts(kind, top_k, has_bias, session_of):
    """Against plain numpy; experts say so much that one too many or a wrong weight would show."""
    random, (dim, hidden, num_experts) = np.random.default_rng(2), (32, 64, 4)
    gate = random.standard_normal((dim, num_experts)).astype(np.float32) * 0.2
    shapes = {"w1": (dim, hidden), "w2": (hidden, dim)}
    floats = {f"e{expert}_{part}": random.standard_normal(shape).astype(np.float32)
              for expert in range(num_experts) for part, shape in shapes.items()}  # fmt: skip
    biases = {part: has_bias * random.standard_normal((num_experts, shape[1])).astype(np.float32)
              for part, shape in shapes.items()}  # fmt: skip
    mixture = Mixture(
        num_experts=num_experts,
        top_k=top_k,
        activation="swish",
        bias=has_bias,
        weights=kind,
        block_size=16 if kind == "int4" else 0,
    )
    makers = {"int8": int8_mixture, "int4": functools.partial(int4_mixture, dim=dim, hidden=hidden)}
    function = makers.get(kind, float_mixture)(mixture)
    initial, restored = {"gate": gate}, {}
    for name in [value.name for value in function.inputs][2:]:
        expert, _, part = name.partition("_")
        if name == "w2_bias":
            initial[name] = biases["w2"]
        elif part.endswith("bias"):
            initial[name] = biases[part[:2]][int(expert[1:])].astype(np.float16 if kind == "fp16" else np.float32)
        elif kind == "int8" and not part.endswith("scale"):
            initial[name], initial[f"{name}_scale"] = int8_columns(floats[name])
            restored[name] = initial[name] * initial[f"{name}_scale"]
        elif kind == "int4" and not part.endswith("scale"):
            initial[name], scale = int4_blocks(floats[name], 16)
            initial[f"{name}_scale"] = scale.ravel()
            restored[name] = from_int4_blocks(initial[name], scale, len(floats[name]))
        elif not part.endswith("scale"):
            initial[name] = floats[name].astype(np.float16) if kind == "fp16" else floats[name]
            restored[name] = floats[name]
    initial = {value.name: initial[value.name] for value in list(function.inputs)[1:]}
    dtype = np.float16 if kind == "fp16" else np.float32
    session = session_of([function], {"x": 3}, initial, dtype=dtype)
    x = random.standard_normal((2, 40, dim)).astype(dtype)
    x[0, 3] = 0  # weights of experts are all alike
    found = session.run(None, {"x": x})[0]

    layer = Experts(gate=gate, top_k=top_k, act=torch.nn.functional.silu, weights=restored, biases=biases)
    tokens = x.reshape(-1, dim).astype(np.float32)
    limit = {"fp32": 1e-5, "fp16": 3e-3, "int8": 3e-3, "int4": 1e-2}[kind]
    rounded = kind in ("int8", "int4")  # MatMulNBits rounds blocks of a row, which is finer
    expected = layer.said_of(tokens, rounded=rounded)
    assert relative_error(expected, found.reshape(-1, dim)) < limit
    others = dataclasses.replace(layer, top_k=top_k + 1).said_of(tokens, rounded=rounded)
    assert relative_error(others, found.reshape(-1, dim)) > 2 * limit
    np.testing.assert_allclose(session.run(None, {"x": x[:, :4]})[0], found[:, :4], rtol=1e-3, atol=1e-3)
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, dim)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_int8_experts_are_those_the_router_chose(kind, num_experts, top_k, has_bias, session_of):
    """Against plain numpy, expert by expert; experts differ so much that a wrong one would show."""
    random = np.random.default_rng(1)
    gate = random.standard_normal((16, num_experts)).astype(np.float32)
    mixture = Mixture(num_experts=num_experts, top_k=top_k, activation=kind, bias=has_bias, weights="int8")
    function = int8_mixture(mixture)
    names = [value.name for value in function.inputs][2:]
    initial = {"gate": gate}
    biases = {part: np.zeros((num_experts, size), np.float32) for part, size in (("w1", 12), ("w2", 16))}
    if has_bias:
        biases = {part: random.standard_normal(bias.shape).astype(np.float32) for part, bias in biases.items()}
    for name in names:
        if name.endswith("w1_bias"):
            initial[name] = biases["w1"][int(name[1 : name.index("_")])]
        elif name == "w2_bias":
            initial[name] = biases["w2"]
        elif not name.endswith("scale"):
            expert, part = int(name[1 : name.index("_")]), name.split("_")[1]
            shape = (16, 12) if part == "w1" else (12, 16)
            weight = (random.standard_normal(shape) * (1 + expert)).astype(np.float32)
            initial[name], initial[f"{name}_scale"] = int8_columns(weight)
    initial = {"gate": gate, **{name: initial[name] for name in names}}
    session = session_of([function], {"x": 3}, initial)
    x = random.standard_normal((2, 9, 16)).astype(np.float32)
    x[1, 4] = 0
    found = session.run(None, {"x": x})[0]

    weights = {name: initial[name] * initial[f"{name}_scale"] for name in initial if name[-2:] in ("w1", "w2")}
    layer = Experts(
        gate=gate,
        top_k=top_k,
        act=ACTIVATIONS[kind],
        weights=weights,
        biases=biases,
        least_hidden=LOWEST.get(kind, 0) or 1e-20,
    )
    expected = layer.said_of(x.reshape(-1, 16), rounded=True)
    # one step of an activation that lies on the edge of rounding is 1/127 of its row's peak
    assert relative_error(expected, found.reshape(-1, 16)) < 3e-3
    np.testing.assert_array_equal(session.run(None, {"x": x[:, :4]})[0], found[:, :4])
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, 16)
