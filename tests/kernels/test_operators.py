"""Native operators compared with the functions that they replace, and products with plain numpy. Integer sums are
exact, so results differ only by the order of float additions. This may round a hidden activation halfway between two
integers to the other one: a step of 1/127 of the largest in its row. It is rare, depending on the processor; a quarter
of the rows may have it. test_experts and test_exact_products also compare functions with numpy."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import layer_model, mixture_model, mixture_weights, packed_layer_model, random_matrix, session_with

from u2moe.quantize.arithmetic import Int4, from_int4_blocks, int4_blocks, int8_columns
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import ACTIVATIONS, lowest_of
from u2moe.runtime.model.session import ONNXRUNTIME_ERRORS

INT8 = Int8Conversion()
MOST_ROWS = 65536


def outputs(model, library, feeds):
    """Return the first output of the function and of the native kernel."""
    return [session_with(model, file).run(None, feeds)[0] for file in (None, library)]


def check_rows(expected, found):
    """Compare the error of each row, relative to the mean size of a row, with that of the order of additions, and for
    a few rows with that of a hidden activation rounded to the other integer."""
    assert found.shape == expected.shape
    expected, found = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (expected, found))
    assert np.isfinite(found).all()
    size = np.sqrt(np.mean(np.sum(np.square(expected), axis=1))) if expected.size else 1.0
    errors = np.linalg.norm(expected - found, axis=1) / max(size, 1e-30)
    assert (errors < 0.03).all(), errors.max()
    assert np.count_nonzero(errors > 3e-6) <= 2 + len(errors) // 4, np.sort(errors)


def product_of(weight, scale, **options):
    """Build a model with one product of quantized rows."""
    fed, weights = {"q": np.uint8, "row_scale": np.float32}, {"weight": weight, "scale": scale}
    return layer_model(INT8.product_of_rows(bias=bool(options)), fed, weights | options, {})


def rows_of(random, num_rows, width, spread):
    """Return rows of unequal size."""
    return (random.standard_normal((num_rows, width)) * random.lognormal(0, spread, (num_rows, 1))).astype(np.float32)


def in_int8(weights, mixture, sizes):
    """Return 4-bit experts as the int8 experts that native kernels make of them."""
    found = {"gate": weights["gate"]}
    if mixture.bias:
        found["w2_bias"] = np.stack([weights[f"e{expert}_w2_bias"] for expert in range(mixture.num_experts)])
    for expert in range(mixture.num_experts):
        for part, rows in (("w1", sizes[0]), ("w2", sizes[1])):
            name = f"e{expert}_{part}"
            integers, steps, scale = (weights[f"{name}{ending}"] for ending in ("", "_steps", "_scale"))
            whole = from_int4_blocks(Int4(integers, steps, np.ones_like(scale)), rows).astype(np.int8)
            found |= {name: whole, f"{name}_scale": scale}
            found |= {f"{name}_bias": weights[f"{name}_bias"]} if mixture.bias and part == "w1" else {}
    return found


MIXTURES = st.builds(
    lambda num_experts, top_k, activation, bias, block_size: mixture_of(
        num_experts, top_k, block_size, activation=activation, bias=bias
    ),
    num_experts=st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33, 64])), top_k=st.integers(1, 4),
    activation=st.sampled_from([*ACTIVATIONS]), bias=st.booleans(), block_size=st.sampled_from([0, 0, 16, 32, 64, 128]),
)  # fmt: skip
SIZES = st.tuples(st.integers(1, 70), st.one_of(st.integers(1, 70), st.integers(120, 140)))
TOKENS = st.one_of(st.integers(0, 40), st.sampled_from([64, 129, 300]))


def mixture_of(num_experts, top_k, block_size, activation="swish", **chosen):
    """Return a mixture in int4 or, if `block_size` is 0, int8."""
    form = {"weights": "int4" if block_size else "int8", "block_size": block_size, "activation": activation}
    return Mixture(num_experts=num_experts, top_k=min(top_k, num_experts), **form, **chosen)


def check_mixture(library, mixture, sizes, x, seed):
    """Compare int8 with its function, and 4 bits with int8 to the last bit."""
    weights = mixture_weights(np.random.default_rng(seed), mixture, *sizes)
    model = mixture_model(mixture, weights, *sizes)
    if mixture.weights == "int4":
        (in_four,) = session_with(model, library).run(None, {"x": x})
        mixture = dataclasses.replace(mixture, weights="int8", block_size=0)
        model = mixture_model(mixture, in_int8(weights, mixture, sizes), *sizes)
        np.testing.assert_array_equal(session_with(model, library).run(None, {"x": x})[0], in_four)
    check_rows(*outputs(model, library, {"x": x}))


@given(mixture=MIXTURES, sizes=SIZES, num_tokens=TOKENS, seed=st.integers(0, 99))
def test_a_mixture_computes_what_its_function_does(library, mixture, sizes, num_tokens, seed):
    check_mixture(library, mixture, sizes, rows_of(np.random.default_rng(seed), num_tokens, sizes[0], 1), seed)


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("block_size", [0, 32])
def test_hidden_activations_beyond_a_cache(library, block_size, num_experts):
    """Rows of an expert in several parts, and experts in several groups: 384 kB can store 65 rows of this size."""
    x = np.random.default_rng(7).standard_normal((300, 40)).astype(np.float32)
    check_mixture(library, mixture_of(num_experts, 2, block_size), (40, 1500), x, 7)


@pytest.mark.parametrize("kind", ["int8", "int4", "gated"])
def test_threads_and_neighbours_change_no_bit(library, kind):
    """Neither the number of threads nor other rows of the call matter."""
    random, mixture = np.random.default_rng(2), mixture_of(5, 2, 32 * (kind == "int4"))
    if kind == "gated":
        model = feed_forward_model("swish", (200, 1500), bias=True, is_gated=True, random=random)
    else:
        model = mixture_model(mixture, mixture_weights(random, mixture, 200, 330), 200, 330)
    x = random.standard_normal((150, 200)).astype(np.float32)
    (whole,) = session_with(model, library).run(None, {"x": x})
    for num_threads in (2, 3, 5):
        np.testing.assert_array_equal(session_with(model, library, num_threads).run(None, {"x": x})[0], whole)
    session = session_with(model, library)
    parts = [session.run(None, {"x": x[i : i + 7]})[0] for i in range(0, 150, 7)]
    np.testing.assert_array_equal(np.vstack(parts), whole)


@given(
    st.integers(0, 40), st.integers(1, 140), st.integers(1, 100), st.sampled_from(["", *ACTIVATIONS]), st.integers(0, 9)
)
def test_products_compute_what_numpy_does(library, num_rows, inner, columns, kind, seed):
    random = np.random.default_rng(seed)
    x, (weight, scale) = rows_of(random, num_rows, inner, 2), int8_columns(random_matrix(random, inner, columns))
    rows = layer_model(INT8.rows(kind or None), {"x": np.float32}, {}, {"activation": kind})
    q, row_scale = session_with(rows, library).run(None, {"x": x})
    lowest = np.float32(lowest_of(kind) or 0.0)
    peak = np.maximum(np.abs(x).max(axis=1, keepdims=True), lowest)
    np.testing.assert_array_equal(row_scale, peak * np.float32(1 / 127))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(q, np.rint(x / row_scale) + 128)
    (found,) = session_with(product_of(weight, scale), library).run(None, {"q": q, "row_scale": row_scale})
    expected = (((q.astype(np.int64) - 128) @ weight.astype(np.int64)).astype(np.float32) * scale) * row_scale
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("weight", [-128, 127])
def test_sums_of_the_longest_rows_are_exact_and_longer_rows_an_error(library, weight):
    """32 bits can store them, with little room; sums of pairs would saturate 16 bits."""
    shapes, ones = [(MOST_ROWS, 2), (MOST_ROWS + 1, 2)], np.ones(2, np.float32)
    made = [product_of(np.full(shape, weight, np.int8), ones) for shape in shapes]
    q = np.stack([np.full(MOST_ROWS, code, np.uint8) for code in (0, 255)])
    (found,) = session_with(made[0], library).run(None, {"q": q, "row_scale": np.ones((2, 1), np.float32)})
    exact = np.array([-128.0, 127.0])[:, np.newaxis] * weight * MOST_ROWS
    np.testing.assert_allclose(found, np.tile(exact, 2), rtol=1e-6)
    with pytest.raises(ONNXRUNTIME_ERRORS, match="a weight has 65537 rows, expected at most 65536"):
        session_with(made[1], library)


@pytest.mark.parametrize("block_size", [0, 32])
def test_numbers_at_the_limits_stay_in_their_rows(library, block_size):
    random, mixture = np.random.default_rng(4), mixture_of(4, 2, block_size)
    session = session_with(mixture_model(mixture, mixture_weights(random, mixture, 48, 64), 48, 64), library)
    x = random.standard_normal((6, 48)).astype(np.float32)
    (expected,) = session.run(None, {"x": x})
    for bad in (np.nan, np.inf, 3e38, 1e-44):
        x[2] = bad
        (found,) = session.run(None, {"x": x})
        np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(expected, 2, axis=0))
        assert np.isfinite(found[2]).all() or bad > 1 or np.isnan(bad)
        assert not np.isfinite(found[2]).all() or bad < 1e38


@pytest.mark.parametrize("kind", [None, "swish"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_computes_what_its_function_does(library, bias, kind):
    random = np.random.default_rng(5)
    weight, scale = int8_columns(random_matrix(random, 80, 90))
    own = {"bias": random.standard_normal(90).astype(np.float32)} if bias else {}
    linear, weights = INT8.linear(80, 90, bias=bias, after=kind), {"weight": weight, "scale": scale, **own}
    layer = layer_model(linear, {"x": np.float32}, weights, {"activation": kind or ""})
    for num_rows in (0, 1, 5, 70):
        x = random.standard_normal((2, num_rows, 80)).astype(np.float32)
        x = np.maximum(x, -0.2) if kind else x
        plain, native = outputs(layer, library, {"x": x})
        np.testing.assert_allclose(native, plain, rtol=1e-5, atol=1e-6)
        feeds = {"q": random.integers(1, 256, x.shape, np.uint8), "row_scale": np.abs(x[..., :1]) / np.float32(127)}
        plain, native = outputs(product_of(weight, scale, **own), library, feeds)
        np.testing.assert_allclose(native, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@given(
    operator=st.sampled_from(["Linear", "FeedForward", "GatedFeedForward"]), sizes=SIZES, num_rows=TOKENS,
    block_size=st.sampled_from([16, 32, 64, 128]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_layer_in_int4_is_that_in_int8_with_its_weights(library, operator, sizes, num_rows, block_size, bias, seed):
    """The results are identical to the last bit. Int4 products name no activation."""
    random, ones = np.random.default_rng(seed), {"w1": sizes, "w2": sizes[::-1]}
    shapes = {"Linear": {"weight": sizes}, "FeedForward": ones, "GatedFeedForward": {"gate": sizes, **ones}}[operator]
    four, eight = {}, {}
    for name, shape in shapes.items():
        made = int4_blocks(random_matrix(random, *shape), block_size)
        whole = from_int4_blocks(made._replace(scale=np.ones(shape[1], np.float32)), shape[0]).astype(np.int8)
        own = {f"{name}_scale": made.scale}
        if bias and name != "gate":
            own[f"{name}_bias"] = random.standard_normal(shape[1]).astype(np.float32)
        four |= {name: made.integers, f"{name}_steps": made.steps, **own}
        eight |= {name: whole, **own}
    attributes = {"activation": "" if operator == "Linear" else "swish"}
    attributes |= {} if operator == "Linear" else {"bias": int(bias)}
    added = {"in": sizes[0], "block_size": block_size}
    x, fed = random.standard_normal((num_rows, sizes[0])).astype(np.float32), {"x": np.float32}
    found, expected = (
        session_with(packed_layer_model(f"{bits}{operator}", ["y"], fed, weights, own), library).run(None, {"x": x})[0]
        for bits, weights, own in (("Int4", four, attributes | added), ("Int8", eight, attributes))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["", *ACTIVATIONS])
def test_rows_that_are_not_numbers_give_none(library, kind):
    """This holds on every instruction set, so that a damaged model is detected. Without an activation: only the
    product."""
    random = np.random.default_rng(5)
    if kind:
        model = feed_forward_model(kind, (60, 50), bias=False, is_gated=False, random=random)
    else:
        weights = dict(zip(("weight", "scale"), int8_columns(random_matrix(random, 60, 60)), strict=True))
        model = layer_model(INT8.linear(60, 60, bias=False), {"x": np.float32}, weights, {"activation": ""})
    session, x = session_with(model, library), random.standard_normal((3, 60)).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 7] = bad
        found = session.run(None, {"x": x})[0]
        np.testing.assert_array_equal(np.isnan(found), np.repeat([[False], [True], [False]], 60, axis=1))


def feed_forward_model(kind, sizes, *, bias, is_gated, random):
    """Build a model with one call of a feed-forward layer."""
    weights = {}
    for name, shape in (("gate", sizes), ("w1", sizes), ("w2", sizes[::-1])):
        if name == "gate" and not is_gated:
            continue
        weights[name], weights[f"{name}_scale"] = int8_columns(random_matrix(random, *shape))
        if bias and name != "gate":
            weights[f"{name}_bias"] = 0.2 * random.standard_normal(shape[1]).astype(np.float32)
    function = INT8.feed_forward(*sizes, kind, bias=bias, gated=is_gated)
    return layer_model(function, {"x": np.float32}, weights, {"activation": kind, "bias": int(bias)})


@given(
    kind=st.sampled_from([*ACTIVATIONS]), sizes=SIZES, num_rows=TOKENS,
    form=st.fixed_dictionaries({"bias": st.booleans(), "is_gated": st.booleans()}), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_feed_forward_layer_computes_what_its_function_does(library, kind, sizes, num_rows, form, seed):
    random = np.random.default_rng(seed)
    model = feed_forward_model(kind, sizes, **form, random=random)
    check_rows(*outputs(model, library, {"x": rows_of(random, num_rows, sizes[0], 1)}))
