"""Native attention with a cache compared with its function, and inputs that do not match."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import attention_model, attention_shapes, next_cache_model, session_with

from u2moe.runtime.graph.attention import Heads
from u2moe.runtime.model.session import ONNXRUNTIME_ERRORS

ROUNDING = 2e-5
"""Tolerance relative to values of size 1: sums have another order, and the exponential differs."""
MASKED = np.finfo(np.float32).min


def feeds_of(random, heads, batch, time, past, *, relative, wide=(1, 1, 1)):
    """Return random inputs; `wide` as for `attention_shapes`."""
    shapes = attention_shapes(heads, batch, time, past, relative=relative, wide=wide)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["bias"][random.random(feeds["bias"].shape) < 0.2] = MASKED
    return {**feeds, "block": np.array(1), "first_kept": random.integers(0, time + 1, 1)}


@given(
    heads=st.builds(
        lambda kv, group, size: Heads(num_heads=kv * group, num_kv_heads=kv, size=size),
        st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 5, 16, 24, 32]),
    ),
    sizes=st.tuples(st.integers(1, 3), st.sampled_from([1, 7, 16, 17, 40]), st.integers(0, 40)),
    wide=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    relative=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_computes_what_its_function_does(library, heads, sizes, wide, relative, seed):
    feeds = feeds_of(np.random.default_rng(seed), heads, *sizes, relative=relative, wide=wide)
    model = attention_model(heads, relative=relative)
    expected, found = (session_with(model, file).run(None, feeds) for file in (None, library))
    np.testing.assert_allclose(found[0], expected[0], atol=ROUNDING, rtol=ROUNDING)
    np.testing.assert_array_equal(found[1], expected[1])


def test_what_no_query_may_see_is_not_seen(library):
    """Masked keys and values may contain any number; a row that sees nothing is the mean of all, as in the graph."""
    random, heads = np.random.default_rng(0), Heads(num_heads=2, num_kv_heads=2, size=20)
    session = session_with(attention_model(heads, relative=False), library)
    feeds = feeds_of(random, heads, 2, 5, 9, relative=False, wide=(1, 0, 0))
    feeds["bias"][:] = 0
    feeds["bias"][0, ..., :4] = feeds["bias"][1] = MASKED
    context, _ = session.run(None, feeds)
    feeds["cache"][:, 0, :, :4] = 1e30
    np.testing.assert_array_equal(session.run(None, feeds)[0][0], context[0])
    values = np.concatenate([feeds["cache"][1, 1, 0, :, 20:], feeds["key_value"][1, :, 20:40]])
    np.testing.assert_allclose(context[1, 0, :20], values.mean(axis=0), atol=ROUNDING)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["query", "key_value", "cache", "bias"])
def test_what_is_no_number_stays_none(library, name, bad):
    """As in the function, so that a damaged model is detected."""
    heads = Heads(num_heads=2, num_kv_heads=2, size=20)
    feeds = feeds_of(np.random.default_rng(2), heads, 1, 4, 5, relative=False)
    feeds[name].reshape(-1)[-1] = bad
    model = attention_model(heads, relative=False)
    expected, found = (session_with(model, file).run(None, feeds)[0] for file in (None, library))
    assert np.isnan(found).any() or name == "cache"  # another block of the cache is read
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


def test_threads_neighbours_and_batches_without_frames_change_no_bit_of_attention(library):
    random, heads = np.random.default_rng(1), Heads(num_heads=4, num_kv_heads=2, size=24)
    model = attention_model(heads, relative=True)
    feeds = feeds_of(random, heads, 3, 21, 30, relative=True)
    context, kept = session_with(model, library).run(None, feeds)
    for found, expected in zip(session_with(model, library, 3).run(None, feeds), (context, kept), strict=True):
        np.testing.assert_array_equal(found, expected)
    alone = {name: array[1:2] for name, array in feeds.items() if name not in ("block", "first_kept", "cache")}
    alone |= {"cache": feeds["cache"][:, 1:2], "block": feeds["block"], "first_kept": feeds["first_kept"]}
    np.testing.assert_array_equal(session_with(model, library).run(None, alone)[0], context[1:2])
    # It is computed at once, without visiting rows
    heads, batch = Heads(num_heads=2, num_kv_heads=1, size=8), 2**40
    session = session_with(attention_model(heads, relative=False), library)
    context, kept = session.run(None, feeds_of(np.random.default_rng(0), heads, batch, 0, 0, relative=False))
    assert context.shape == (batch, 0, 16)
    assert kept.shape == (1, batch, 1, 0, 16)


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
    for threads in (1, 3):
        (found,) = session_with(next_cache_model(num_blocks), library, threads).run(None, feeds)
        np.testing.assert_array_equal(found, np.concatenate([cache[:, :, :, first:], np.concatenate(kept)], axis=3))
    feeds["kept.0"] = np.zeros((1, batch, heads, times[1], width + 1), np.float32)
    with pytest.raises(ONNXRUNTIME_ERRORS, match="input 2 does not match the other inputs"):
        session_with(next_cache_model(num_blocks), library).run(None, feeds)
