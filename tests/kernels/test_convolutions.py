"""The front end's native convolutions against their function."""

import numpy as np
import pytest
from layers import convolutions_model, session_with

from u2moe.quantize.passes.front_end import FirstConvolutions, Window
from u2moe.runtime.model.session import ONNXRUNTIME_ERRORS

ROUNDING = 3e-6
"""Relative error of a row by the order of additions alone."""
STEPS = 0.03
"""The same where values between two integers were rounded to the other one of them."""


def layer(*, bins=23, channels=20, out=40, first=(3, 2), second=(3, 2), **changed):
    windows = [Window(kernel=kernel, stride=stride) for kernel, stride in (first, second)]
    both = FirstConvolutions(bins=bins, channels=channels, first=windows[0], second=windows[1])
    return convolutions_model(both, out, np.random.default_rng(0), changed)


@pytest.mark.parametrize("sizes", [{}, {"second": (5, 3), "channels": 16}, {"first": (2, 1), "out": 33, "channels": 7}])
@pytest.mark.parametrize(("batch", "time"), [(1, 7), (2, 30), (3, 6), (2, 200), (0, 20)])
def test_convolutions_compute_what_their_function_does(library, sizes, batch, time):
    model = layer(**sizes)
    x = np.random.default_rng(1).normal(1, 2, (batch, time, 23)).astype(np.float32)
    expected, found = (session_with(model, file).run(None, {"x": x})[0] for file in (None, library))
    assert found.shape == expected.shape
    if not found.size:
        return
    errors = np.linalg.norm(expected - found, axis=-1).ravel() / np.linalg.norm(expected, axis=-1).mean()
    assert (errors < STEPS).all()
    assert np.count_nonzero(errors > ROUNDING) <= 2 + len(errors) // 2


def test_frames_do_not_depend_on_threads_or_neighbours(library):
    x = np.random.default_rng(2).normal(1, 2, (2, 120, 23)).astype(np.float32)
    (whole,) = session_with(layer(), library).run(None, {"x": x})
    np.testing.assert_array_equal(session_with(layer(), library, 3).run(None, {"x": x})[0], whole)
    (part,) = session_with(layer(), library).run(None, {"x": x[1:, 40:80]})
    np.testing.assert_array_equal(part, whole[1:, 10 : 10 + part.shape[1]])


def test_what_is_never_positive_gives_the_bias(library):
    x = np.zeros((1, 20, 23), np.float32)
    model = layer()
    expected, found = (session_with(model, file).run(None, {"x": x})[0] for file in (None, library))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bins": 2}, "attribute bins is less than the kernels need"),
        ({"kernels": [3]}, "attribute kernels must be two numbers from 1 to 64"),
        ({"strides": [0, 2]}, "attribute strides must be two numbers from 1 to 64"),
        ({"kernels": [4, 3]}, r"first_weight\) must be of element type 1 and shape \[17, 20\]"),
    ],
)
def test_attributes_that_lie_are_an_error(library, operators, changes, message):
    if "Int8FirstConvolutions" not in operators:
        pytest.skip("the convolutions of this instruction set are onnxruntime's")
    with pytest.raises(ONNXRUNTIME_ERRORS, match=message):
        session_with(layer(**changes), library)


def test_features_of_another_size_are_an_error(library):
    with pytest.raises(ONNXRUNTIME_ERRORS):
        session_with(layer(), library).run(None, {"x": np.ones((1, 20, 24), np.float32)})
