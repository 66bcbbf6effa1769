"""Functions of quantized products and convolutions, compared with numpy and torch."""

import numpy as np
import pytest
import torch
from layers import layer_model, session_with
from quantized import IN_TORCH, LOWEST, rounded_rows

from u2moe.quantize.arithmetic import int8_columns, relative_error
from u2moe.quantize.formats import CONVERSIONS, conversion
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.passes.front_end import FirstConvolutions, Window, int8_convolution
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS

pytestmark = pytest.mark.slow
INT8 = Int8Conversion()


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
    session = session_of(
        [FirstConvolutions(bins=9, channels=4, first=window, second=window).function()], {"x": 3}, weights
    )
    found = session.run(None, {"x": np.ones((1, 7, 9), np.float32)})[0]
    np.testing.assert_array_equal(found, np.broadcast_to(np.maximum(weights["bias"], 0), (1, 1, 1, 5)))


@pytest.mark.parametrize("kind", sorted(LOWEST))
def test_int8_rows_of_an_activation_are_searched_for_the_largest_value_alone(kind, session_of):
    """Results equal those of any rows, unless all values are so small that the activation's lowest value would not
    fit."""
    random = np.random.default_rng(4)
    x = IN_TORCH[kind](torch.from_numpy(random.standard_normal((2, 5, 24)).astype(np.float32))).numpy()
    integers, scale = int8_columns(random.standard_normal((24, 7)).astype(np.float32))
    weights = {"weight": integers, "scale": scale}
    found, known = (
        session_of([rows, INT8.product_of_rows()], {"x": 3}, weights) for rows in (INT8.rows(), INT8.rows(kind))
    )
    np.testing.assert_array_equal(known.run(None, {"x": x})[0], found.run(None, {"x": x})[0])
    small = IN_TORCH[kind](torch.from_numpy(0.1 * random.standard_normal((1, 5, 24)).astype(np.float32))).numpy()
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


def convolved(x, weight, bias, stride):
    """Compute relu of a convolution in torch, over [batch, channels, time, frequency]."""
    return torch.relu(torch.nn.functional.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias), stride))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 3)])
@pytest.mark.parametrize("time", [7, 8, 12, 23])
def test_int8_convolution_is_a_convolution(kernel, stride, time, session_of):
    random = np.random.default_rng(2)
    x = np.abs(random.standard_normal((2, time, 19, 6))).astype(np.float32)
    x[1, :kernel] = 0
    weight = random.standard_normal((8, 6, kernel, kernel)).astype(np.float32)
    bias = random.standard_normal(8).astype(np.float32)
    integers, scale = int8_columns(weight.transpose(2, 3, 1, 0).reshape(-1, 8))
    session = session_of(
        [int8_convolution(Window(kernel=kernel, stride=stride))],
        {"x": 4},
        {"weight": integers, "scale": scale, "bias": bias},
    )
    found = session.run(None, {"x": x})[0]
    expected = convolved(torch.from_numpy(x).permute(0, 3, 1, 2), weight, bias, stride).permute(0, 2, 3, 1).numpy()
    assert found.shape == expected.shape
    assert relative_error(expected, found) < 0.015
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], found[:1])


@pytest.mark.parametrize(("first", "second"), [((3, 2), (3, 2)), ((3, 2), (5, 3)), ((5, 1), (2, 1))])
@pytest.mark.parametrize("time", [11, 12, 13, 31])
def test_int8_first_convolutions_are_convolutions(first, second, time, session_of):
    random = np.random.default_rng(3)
    x = random.standard_normal((2, time, 21)).astype(np.float32)
    x[1] *= 1e-3
    weights = [random.standard_normal(shape).astype(np.float32)
               for shape in ((6, 1, first[0], first[0]), (8, 6, second[0], second[0]))]  # fmt: skip
    biases = [random.standard_normal(size).astype(np.float32) for size in (6, 8)]
    integers, scale = int8_columns(weights[1].transpose(2, 3, 1, 0).reshape(-1, 8))
    windows = [Window(kernel=kernel, stride=stride) for kernel, stride in (first, second)]
    session = session_of(
        [FirstConvolutions(bins=21, channels=6, first=windows[0], second=windows[1]).function()],
        {"x": 3},
        {
            "first_weight": np.vstack((weights[0].reshape(6, -1).T, biases[0])),
            "weight": integers,
            "scale": scale,
            "bias": biases[1],
        },
    )
    found = session.run(None, {"x": x})[0]
    expected = torch.from_numpy(x).unsqueeze(1)
    for weight, bias, (_, stride) in zip(weights, biases, (first, second), strict=True):
        expected = convolved(expected, weight, bias, stride)
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert found.shape == expected.shape
    assert relative_error(expected, found) < 0.015
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], found[:1])
    frame = first[1] * second[1]  # input frames from one output frame to the next
    np.testing.assert_array_equal(session.run(None, {"x": x[:, :-frame]})[0], found[:, :-1])
    np.testing.assert_array_equal(session.run(None, {"x": x[:, frame:]})[0], found[:, 1:])
