"""Native attention, convolutions and normalisations of streams, and the front end: compared with their functions, wrong
inputs, and constants anywhere in a file."""

import functools

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import (
    attention_model,
    attention_shapes,
    convolutions_model,
    layer_model,
    next_cache_model,
    random_matrix,
    session_with,
    streamed_convolution_model,
)

from u2moe.quantize.arithmetic import int8_columns
from u2moe.quantize.formats import conversion
from u2moe.quantize.passes.front_end import FirstConvolutions, Window
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.attention import Heads
from u2moe.runtime.graph.convolution import TimeConvolution
from u2moe.runtime.graph.layers import add_normalization, normalization
from u2moe.runtime.model.session import ONNXRUNTIME_ERRORS

ROUNDING = 2e-5
"""Tolerance relative to values of size 1: sums have another order, and the exponential differs."""
MASKED = np.finfo(np.float32).min
BLOCKS = 3
FORM = TimeConvolution(kernel=5, activation="swish", bias=True, norm=True, epsilon=1e-5)
HEADS = Heads(num_heads=2, num_kv_heads=2, size=20)


def attention_feeds(random, heads, batch, time, past, *, relative, wide=(1, 1, 1)):
    """Return random inputs; `wide` as for `attention_shapes`."""
    shapes = attention_shapes(heads, batch, time, past, relative=relative, wide=wide)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["bias"][random.random(feeds["bias"].shape) < 0.2] = MASKED
    return {**feeds, "block": np.array(1), "first_kept": random.integers(0, time + 1, 1)}


def convolution_feeds(random, kernel, batch, time, channels):
    shapes = {"linear": (batch, time, channels), "gate": (batch, time, channels)}
    shapes["cache"] = (BLOCKS, batch, kernel - 1, channels)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**feeds, "block": np.array(1)}


def front_end(*, channels=20, out=40, first=(3, 2), second=(3, 2)):
    windows = [Window(kernel=kernel, stride=stride) for kernel, stride in (first, second)]
    both = FirstConvolutions(bins=23, channels=channels, first=windows[0], second=windows[1])
    return convolutions_model(both, out, np.random.default_rng(0))


def outputs(model, library, feeds):
    """Return the outputs of the functions and of the native kernels."""
    return [session_with(model, file).run(None, feeds) for file in (None, library)]


@given(
    heads=st.builds(
        lambda kv, group, size: Heads(num_heads=kv * group, num_kv_heads=kv, size=size),
        st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 5, 16, 24, 32]),
    ),
    sizes=st.tuples(st.integers(1, 3), st.sampled_from([1, 7, 16, 17, 40]), st.integers(0, 40)),
    wide=st.tuples(st.booleans(), st.booleans(), st.booleans()), relative=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_computes_what_its_function_does(library, heads, sizes, wide, relative, seed):
    feeds = attention_feeds(np.random.default_rng(seed), heads, *sizes, relative=relative, wide=wide)
    expected, found = outputs(attention_model(heads, relative=relative), library, feeds)
    np.testing.assert_allclose(found[0], expected[0], atol=ROUNDING, rtol=ROUNDING)
    np.testing.assert_array_equal(found[1], expected[1])


def test_what_no_query_may_see_is_not_seen(library):
    """Masked keys and values may contain any number; a row that sees nothing is the mean of all, as in the graph."""
    session = session_with(attention_model(HEADS, relative=False), library)
    feeds = attention_feeds(np.random.default_rng(0), HEADS, 2, 5, 9, relative=False, wide=(1, 0, 0))
    feeds["bias"][:] = 0
    feeds["bias"][0, ..., :4] = feeds["bias"][1] = MASKED
    context, _ = session.run(None, feeds)
    feeds["cache"][:, 0, :, :4] = 1e30
    np.testing.assert_array_equal(session.run(None, feeds)[0][0], context[0])
    values = np.concatenate([feeds["cache"][1, 1, 0, :, 20:], feeds["key_value"][1, :, 20:40]])
    np.testing.assert_allclose(context[1, 0, :20], values.mean(axis=0), atol=ROUNDING)
    # Without frames it is computed at once, without visiting rows
    context, kept = session.run(None, attention_feeds(np.random.default_rng(0), HEADS, 2**40, 0, 0, relative=False))
    assert (context.shape, kept.shape) == ((2**40, 0, 40), (1, 2**40, 2, 0, 40))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["query", "key_value", "cache", "bias"])
def test_what_is_not_a_number_stays_none(library, name, bad):
    """As in the function, so that a damaged model is detected."""
    feeds = attention_feeds(np.random.default_rng(2), HEADS, 1, 4, 5, relative=False)
    feeds[name].reshape(-1)[-1] = bad
    expected, found = (each[0] for each in outputs(attention_model(HEADS, relative=False), library, feeds))
    assert np.isnan(found).any() or name == "cache"  # another block of the cache is read
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


@pytest.mark.parametrize("layer", ["attention", "convolution", "front end"])
def test_threads_and_neighbours_change_no_bit(library, layer):
    """The neighbours of a convolution of the front end are also frames."""
    random = np.random.default_rng(1)
    if layer == "attention":
        heads = Heads(num_heads=4, num_kv_heads=2, size=24)
        model, feeds = attention_model(heads, relative=True), attention_feeds(random, heads, 3, 21, 30, relative=True)
    elif layer == "convolution":
        model, feeds = streamed_convolution_model(FORM, 40, random), convolution_feeds(random, FORM.kernel, 3, 21, 40)
    else:
        model, feeds = front_end(), {"x": random.normal(1, 2, (2, 120, 23)).astype(np.float32)}
    whole = session_with(model, library).run(None, feeds)
    for found, expected in zip(session_with(model, library, 3).run(None, feeds), whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    own = {name: np.s_[:, 1:2] if name == "cache" else np.s_[1:2] for name in feeds.keys() - {"block", "first_kept"}}
    part = np.s_[1:2]
    if layer == "front end":
        own, part = {"x": np.s_[1:, 40:80]}, np.s_[1:, 10:19]
    alone = feeds | {name: feeds[name][place] for name, place in own.items()}
    np.testing.assert_array_equal(session_with(model, library).run(None, alone)[0], whole[0][part])


@functools.cache
def next_cache_session(library, num_blocks, num_threads):
    return session_with(next_cache_model(num_blocks), library, num_threads)


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(0, 3), min_size=3, max_size=3), times=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    num_blocks=st.integers(1, 3), first=st.sampled_from([-(2**63), -2, 0, 1, 5, 2**63 - 1]),
)  # fmt: skip
def test_the_next_cache_is_that_of_its_function(library, sizes, times, num_blocks, first):
    random, (batch, heads, width) = np.random.default_rng(0), sizes
    cache, *kept = (
        random.standard_normal((blocks, batch, heads, time, width)).astype(np.float32)
        for blocks, time in [(num_blocks, times[0]), *[(1, times[1])] * num_blocks]
    )
    feeds = {"cache": cache, "first": np.array([first]), **{f"kept.{i}": each for i, each in enumerate(kept)}}
    sessions = [next_cache_session(library, num_blocks, num_threads) for num_threads in (1, 3)]
    for session in sessions:
        (found,) = session.run(None, feeds)
        np.testing.assert_array_equal(found, np.concatenate([cache[:, :, :, first:], np.concatenate(kept)], axis=3))
    feeds["kept.0"] = np.zeros((1, batch, heads, times[1], width + 1), np.float32)
    with pytest.raises(ONNXRUNTIME_ERRORS, match="input 2 does not match the other inputs"):
        sessions[0].run(None, feeds)


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
    model, feeds = streamed_convolution_model(form, sizes[2], random), convolution_feeds(random, form.kernel, *sizes)
    expected, found = outputs(model, library, feeds)
    # two channels may be so close that their normalised difference is mostly rounding error
    tolerance = 50 * ROUNDING if form.norm and sizes[2] == 2 else ROUNDING
    np.testing.assert_allclose(found[0], expected[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(found[1], expected[1], atol=ROUNDING, rtol=ROUNDING)


def test_chunks_give_what_the_whole_gives(library):
    random, found = np.random.default_rng(2), []
    session = session_with(streamed_convolution_model(FORM, 40, random), library)
    feeds = convolution_feeds(random, FORM.kernel, 1, 20, 40)
    expected, last = session.run(None, feeds)
    for start in range(0, 20, 3):
        own = {name: feeds[name][:, start : start + 3] for name in ("linear", "gate")}
        y, kept = session.run(None, feeds | own)
        feeds["cache"] = np.concatenate([kept] * BLOCKS)
        found.append(y)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    np.testing.assert_array_equal(kept, last)


@functools.cache
def normalizations(library, size, is_sum):
    """Return sessions of the function, of the native kernel, and of the latter with several threads."""
    random, function = np.random.default_rng(0), add_normalization(1e-5) if is_sum else normalization(1e-5)
    weights = {name: random.standard_normal(size).astype(np.float32) for name in ("weight", "bias")}
    fed = dict.fromkeys(("x", "branch") if is_sum else ("x",), np.float32)
    model = layer_model(function, fed, weights, {"epsilon": 1e-5})
    return [session_with(model, *how) for how in ((None,), (library,), (library, 3))]


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 5, 40, 70]), st.sampled_from([3, 16, 31, 40, 96])),
    is_sum=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_normalisations_compute_what_their_functions_do(library, shape, is_sum, seed):
    random, names = np.random.default_rng(seed), ("x", "branch") if is_sum else ("x",)
    feeds = {name: 3 * random.standard_normal(shape).astype(np.float32) for name in names}
    sessions = normalizations(library, shape[-1], is_sum)
    expected, found, shared = (session.run(None, feeds) for session in sessions)
    np.testing.assert_allclose(found[-1], expected[-1], atol=50 * ROUNDING, rtol=ROUNDING)
    np.testing.assert_array_equal(found[0] if is_sum else 0, expected[0] if is_sum else 0)
    for other, same in zip(shared, found, strict=True):
        np.testing.assert_array_equal(other, same)
    if is_sum:
        with pytest.raises(ONNXRUNTIME_ERRORS, match="input 1 does not match the other inputs"):
            sessions[1].run(None, feeds | {"branch": np.zeros((3, *shape[1:]), np.float32)})


@pytest.mark.parametrize("sizes", [{}, {"second": (5, 3), "channels": 16}, {"first": (2, 1), "out": 33, "channels": 7}])
def test_convolutions_of_the_front_end_compute_what_their_function_does(library, sizes):
    """Errors are relative to a row: from the order of additions, and where a value halfway between two integers is
    rounded to the other one."""
    plain, native = (session_with(front_end(**sizes), file) for file in (None, library))
    for shape in [(1, 7, 23), (2, 30, 23), (3, 6, 23), (2, 200, 23), (0, 20, 23)]:
        x = {"x": np.random.default_rng(1).normal(1, 2, shape).astype(np.float32)}
        expected, found = plain.run(None, x)[0], native.run(None, x)[0]
        assert found.shape == expected.shape
        if found.size:
            errors = np.linalg.norm(expected - found, axis=-1).ravel() / np.linalg.norm(expected, axis=-1).mean()
            assert (errors < 0.03).all()
            assert np.count_nonzero(errors > 3e-6) <= 2 + len(errors) // 2


@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_constants_may_lie_at_any_place_of_a_file(library, tmp_path, layer):
    """Weights and inputs at offsets that are not aligned in memory, where onnxruntime maps them."""
    random, constants = np.random.default_rng(8), {}
    if layer == "linear":
        weights = dict(zip(("weight", "scale"), int8_columns(random_matrix(random, 40, 50)), strict=True))
        weights["bias"] = random.standard_normal(50).astype(np.float32)
        function, x = conversion("int8").linear(40, 50, bias=True), random.standard_normal((4, 40)).astype(np.float32)
        content, x = layer_model(function, {"x": np.float32}, weights, {"activation": ""}), {"x": x}
    else:
        content, constants = (
            streamed_convolution_model(FORM, 20, random),
            convolution_feeds(random, FORM.kernel, 2, 5, 20),
        )
        x = {"linear": constants.pop("linear")}
    expected = session_with(content, library).run(None, x | constants)
    model = onnx.load_from_string(content)
    del model.graph.input[1:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    data = b"odd"
    for tensor in model.graph.initializer:
        data += bytes((1 - len(data)) % 8)
        place = {"location": "weights", "offset": len(data), "length": len(tensor.raw_data)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(at)) for key, at in place.items())
        data += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "weights").write_bytes(data)
    onnx.save(model, tmp_path / "layer.onnx")
    for own, other in zip(session_with(tmp_path / "layer.onnx", library).run(None, x), expected, strict=True):
        np.testing.assert_array_equal(own, other)
