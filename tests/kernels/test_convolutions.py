"""The front end's native convolutions compared with their function."""

import numpy as np
import pytest
from layers import convolutions_model, session_with

from u2moe.quantize.passes.front_end import FirstConvolutions, Window

ROUNDING = 3e-6
"""Relative error of a row from the order of additions only."""
STEPS = 0.03
"""The same if values halfway between two integers were rounded to the other one."""


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
