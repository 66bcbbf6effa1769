"""Functions of quantized products, convolutions and mixtures of experts, compared with numpy and torch."""

import itertools

import numpy as np
import pytest
import torch
from layers import layer_model, session_with
from quantized import IN_TORCH, LOWEST, rounded_rows

from u2moe.quantize.arithmetic import int8_columns, relative_error
from u2moe.quantize.formats import CONVERSIONS, conversion
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.passes.front_end import FirstConvolutions, Window, int8_convolution
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.graph.dispatch import float_mixture

pytestmark = pytest.mark.slow
INT8 = Int8Conversion()


def said_of(tokens, gate, top_k, weights, biases, act, rows):
    """Compute a mixture [tokens, dim] in plain numpy, token by token. `rows` rounds activations, or hidden ones."""
    result = np.zeros_like(tokens)
    for row, token in enumerate(tokens):
        logits = token @ gate
        chosen = np.argsort(-logits, kind="stable")[:top_k]
        shares = np.exp(logits[chosen] - logits.max())
        for expert, share in zip(chosen, shares / shares.sum(), strict=True):
            hidden = rows(token[np.newaxis]) @ weights[f"e{expert}_w1"] + biases["w1"][expert]
            hidden = act(torch.from_numpy(hidden.astype(np.float32))).numpy()
            hidden = rows(hidden, is_hidden=True)[0]
            result[row] += share * (hidden @ weights[f"e{expert}_w2"] + biases["w2"][expert])
    return result


LIMITS = {"fp32": 1e-5, "fp16": 3e-3, "int8": 3e-3, "int4": 1.5e-2}
"""Limit of the relative error of each format. An activation at the edge of rounding changes by 1/127 of its row's peak.
MatMulNBits rounds blocks of a row, which is finer."""
SIZES = [(8, 2), (4, 1), (3, 3), (1, 1)]  # experts, and experts per token
CASES = [
    *itertools.product(WEIGHT_FORMATS, ["swish"], SIZES, [True, False]),
    *(("int8", kind, SIZES[0], True) for kind in IN_TORCH if kind != "swish"),
]


def test_every_format_has_a_limit():
    assert LIMITS.keys() == WEIGHT_FORMATS.keys() == CONVERSIONS.keys() | {"fp32", "fp16"}


@pytest.mark.parametrize(("kind", "activation", "size", "has_bias"), CASES)
def test_tokens_get_the_weighted_sum_of_their_experts(kind, activation, size, has_bias, session_of):
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
    x = random.standard_normal((2, 12, dim)).astype(dtype)
    x[0, 3] = 0  # all experts get the same weight
    found = session.run(None, {"x": x})[0]

    least_hidden = (LOWEST.get(activation, 0) if kind == "int8" else 0) or 1e-20

    def rows(x, *, is_hidden=False):
        return rounded_rows(x, least_hidden if is_hidden else 1e-20) if kind in CONVERSIONS else x

    tokens, others = x.reshape(-1, dim).astype(np.float32), (restored, biases, IN_TORCH[activation], rows)
    assert relative_error(said_of(tokens, gate, top_k, *others), found.reshape(-1, dim)) < LIMITS[kind]
    if top_k < num_experts:
        wrong = said_of(tokens, gate, top_k + 1, *others)
        assert relative_error(wrong, found.reshape(-1, dim)) > 2 * LIMITS[kind]
    alone, (rtol, atol) = session.run(None, {"x": x[:, :4]})[0], (0, 0) if kind == "int8" else (1e-3, 1e-2)
    np.testing.assert_allclose(alone, found[:, :4], rtol=rtol, atol=atol)
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, dim)


def test_int8_functions_are_what_they_say_also_for_nothing_positive(session_of):
    random = np.random.default_rng(0)
    x = (random.standard_normal((3, 5, 24)) * random.lognormal(0, 2, (3, 5, 1))).astype(np.float32)
    x[1, 2] = 0
    integers, scale = int8_columns(random.standard_normal((24, 7)).astype(np.float32))
    session = session_of([INT8.rows(), INT8.product_of_rows()], {"x": 3}, {"weight": integers, "scale": scale})
    found = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, rounded_rows(x) @ (integers * scale), rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], found[:1])
    window = Window(kernel=3, stride=2)
    weights = {"first_weight": -np.ones((10, 4), np.float32), "weight": np.ones((36, 5), np.int8)}
    weights |= {"scale": np.ones(5, np.float32), "bias": np.arange(-2, 3, dtype=np.float32)}
    function = FirstConvolutions(bins=9, channels=4, first=window, second=window).function()
    found = session_of([function], {"x": 3}, weights).run(None, {"x": np.ones((1, 7, 9), np.float32)})[0]
    np.testing.assert_array_equal(found, np.broadcast_to(np.maximum(weights["bias"], 0), (1, 1, 1, 5)))


@pytest.mark.parametrize("kind", sorted(LOWEST))
def test_int8_rows_of_an_activation_are_searched_for_the_largest_value_alone(kind, session_of):
    """Results equal those of any rows, unless all values are smaller than the activation's lowest value."""
    random = np.random.default_rng(4)

    def activated(x):
        return IN_TORCH[kind](torch.from_numpy(x.astype(np.float32))).numpy()

    x = activated(random.standard_normal((2, 5, 24)))
    integers, scale = int8_columns(random.standard_normal((24, 7)).astype(np.float32))
    weights = {"weight": integers, "scale": scale}
    product = INT8.product_of_rows()
    found, known = (session_of([INT8.rows(each), product], {"x": 3}, weights) for each in (None, kind))
    np.testing.assert_array_equal(known.run(None, {"x": x})[0], found.run(None, {"x": x})[0])
    small = activated(0.1 * random.standard_normal((1, 5, 24)))
    expected = rounded_rows(small, LOWEST[kind] or 1e-20) @ (integers * scale)
    np.testing.assert_allclose(known.run(None, {"x": small})[0], expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONVERSIONS if "embeddings" in WEIGHT_FORMATS[name].groups])
def test_an_embedding_gives_the_rows_of_its_table(name):
    table, made = np.random.default_rng(1).standard_normal((7, 40)).astype(np.float32), conversion(name, 16)
    parts = made.of_tables().parts(table.T)
    restored = made.of_tables().restored(parts, 40).T
    assert relative_error(table, restored) < 0.1
    function, tokens = made.embedding(40), np.array([[3, 0], [6, 3]])
    feeds = dict(zip([value.name for value in function.inputs], [*parts, tokens], strict=True))
    session = session_with(layer_model(function, {key: array.dtype for key, array in feeds.items()}, {}, {}))
    np.testing.assert_allclose(session.run(None, feeds)[0], restored[tokens], rtol=1e-6)


def check_convolutions(session, x, channels, layers):
    """Compare with convolutions and their relu in torch. `layers` are weights, biases and strides."""
    found, expected = session.run(None, {"x": x})[0], channels
    for weight, bias, stride in layers:
        expected = torch.nn.functional.conv2d(expected, torch.from_numpy(weight), torch.from_numpy(bias), stride).relu()
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert found.shape == expected.shape
    assert relative_error(expected, found) < 0.015
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], found[:1])
    return found


def drawn_layer(random, *shape):
    weight, bias = random.standard_normal(shape).astype(np.float32), random.standard_normal(shape[0]).astype(np.float32)
    return weight, bias, *int8_columns(weight.transpose(2, 3, 1, 0).reshape(-1, shape[0]))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 3)])
def test_int8_convolution_is_a_convolution(kernel, stride, session_of):
    random = np.random.default_rng(2)
    weight, bias, integers, scale = drawn_layer(random, 8, 6, kernel, kernel)
    function = int8_convolution(Window(kernel=kernel, stride=stride))
    session = session_of([function], {"x": 4}, {"weight": integers, "scale": scale, "bias": bias})
    for time in (7, 8, 12, 23):
        x = np.abs(random.standard_normal((2, time, 19, 6))).astype(np.float32)
        x[1, :kernel] = 0
        check_convolutions(session, x, torch.from_numpy(x).permute(0, 3, 1, 2), [(weight, bias, stride)])


@pytest.mark.parametrize(("first", "second"), [((3, 2), (3, 2)), ((3, 2), (5, 3)), ((5, 1), (2, 1))])
def test_int8_first_convolutions_are_convolutions(first, second, session_of):
    random = np.random.default_rng(3)
    weight, bias, _, _ = drawn_layer(random, 6, 1, first[0], first[0])
    other, other_bias, integers, scale = drawn_layer(random, 8, 6, second[0], second[0])
    windows = [Window(kernel=kernel, stride=stride) for kernel, stride in (first, second)]
    function = FirstConvolutions(bins=21, channels=6, first=windows[0], second=windows[1]).function()
    weights = {"first_weight": np.vstack((weight.reshape(6, -1).T, bias)), "weight": integers}
    session = session_of([function], {"x": 3}, {**weights, "scale": scale, "bias": other_bias})
    layers, frame = [(weight, bias, first[1]), (other, other_bias, second[1])], first[1] * second[1]
    for time in (11, 12, 13, 31):
        x = random.standard_normal((2, time, 21)).astype(np.float32)
        x[1] *= 1e-3
        found = check_convolutions(session, x, torch.from_numpy(x).unsqueeze(1), layers)
        # input frames from one output frame to the next
        np.testing.assert_array_equal(session.run(None, {"x": x[:, :-frame]})[0], found[:, :-1])
        np.testing.assert_array_equal(session.run(None, {"x": x[:, frame:]})[0], found[:, 1:])
