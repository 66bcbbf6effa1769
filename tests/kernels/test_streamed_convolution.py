"""The native convolution of streamed blocks and layer normalisations: compared with their functions, and wrong
inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import layer_model, session_with, streamed_convolution_model

from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.convolution import TimeConvolution
from u2moe.runtime.graph.layers import add_normalization, normalization
from u2moe.runtime.model.session import ONNXRUNTIME_ERRORS

ROUNDING = 2e-5
"""Tolerance for values of size 1: sums have another order."""
BLOCKS = 3
FED = {"linear": np.float32, "gate": np.float32, "cache": np.float32, "block": np.int64}


def feeds_of(random, kernel, batch, time, channels):
    shapes = {"linear": (batch, time, channels), "gate": (batch, time, channels)}
    shapes["cache"] = (BLOCKS, batch, kernel - 1, channels)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**feeds, "block": np.array(1)}


@given(
    form=st.builds(
        TimeConvolution, kernel=st.integers(2, 17), activation=st.sampled_from(["", *ACTIVATIONS]),
        bias=st.booleans(), norm=st.booleans(), epsilon=st.just(1e-5),
    ),
    sizes=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 5, 16, 40]), st.sampled_from([2, 7, 16, 33, 64])),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_a_convolution_computes_what_its_function_does(library, form, sizes, seed):
    random = np.random.default_rng(seed)
    model, feeds = streamed_convolution_model(form, sizes[2], random), feeds_of(random, form.kernel, *sizes)
    expected, found = (session_with(model, file).run(None, feeds) for file in (None, library))
    # two channels may be so close that their normalised difference is mostly rounding error
    tolerance = 50 * ROUNDING if form.norm and sizes[2] == 2 else ROUNDING
    np.testing.assert_allclose(found[0], expected[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(found[1], expected[1], atol=ROUNDING, rtol=ROUNDING)


FORM = TimeConvolution(kernel=5, activation="swish", bias=True, norm=True, epsilon=1e-5)


def test_branches_of_another_shape_are_an_error_and_neighbours_change_no_bit(library):
    random = np.random.default_rng(1)
    model, feeds = streamed_convolution_model(FORM, 40, random), feeds_of(random, FORM.kernel, 3, 21, 40)
    whole = session_with(model, library).run(None, feeds)
    for found, expected in zip(session_with(model, library, 3).run(None, feeds), whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    alone = {name: feeds[name][1:2] for name in ("linear", "gate")}
    alone |= {"cache": feeds["cache"][:, 1:2], "block": feeds["block"]}
    np.testing.assert_array_equal(session_with(model, library).run(None, alone)[0], whole[0][1:2])
    weights = dict.fromkeys(("weight", "bias"), np.ones(4, np.float32))
    model = layer_model(add_normalization(1e-5), dict.fromkeys(("x", "branch"), np.float32), weights, {"epsilon": 1e-5})
    x = np.ones((2, 3, 4), np.float32)
    with pytest.raises(ONNXRUNTIME_ERRORS, match="input 1 does not match the other inputs"):
        session_with(model, library).run(None, {"x": x, "branch": x[:1]})


def test_chunks_give_what_the_whole_gives(library):
    random = np.random.default_rng(2)
    model, feeds = streamed_convolution_model(FORM, 40, random), feeds_of(random, FORM.kernel, 1, 20, 40)
    session, found = session_with(model, library), []
    expected, last = session.run(None, feeds)
    cache = feeds["cache"]
    for start in range(0, 20, 3):
        own = {name: feeds[name][:, start : start + 3] for name in ("linear", "gate")}
        y, kept = session.run(None, {**own, "cache": cache, "block": np.array(1)})
        cache = np.concatenate([kept] * BLOCKS)
        found.append(y)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    np.testing.assert_array_equal(cache[:1], last)


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 5, 40, 70]), st.sampled_from([3, 16, 31, 40, 96])),
    is_sum=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_normalisations_compute_what_their_functions_do(library, shape, is_sum, seed):
    random = np.random.default_rng(seed)
    function = add_normalization(1e-5) if is_sum else normalization(1e-5)
    weights = {name: random.standard_normal(shape[-1]).astype(np.float32) for name in ("weight", "bias")}
    names = ("x", "branch") if is_sum else ("x",)
    model = layer_model(function, dict.fromkeys(names, np.float32), weights, {"epsilon": 1e-5})
    feeds = {name: 3 * random.standard_normal(shape).astype(np.float32) for name in names}
    expected, found = (session_with(model, file).run(None, feeds) for file in (None, library))
    np.testing.assert_allclose(found[-1], expected[-1], atol=50 * ROUNDING, rtol=ROUNDING)
    np.testing.assert_array_equal(found[0] if is_sum else 0, expected[0] if is_sum else 0)
    for other, same in zip(session_with(model, library, 3).run(None, feeds), found, strict=True):
        np.testing.assert_array_equal(other, same)
