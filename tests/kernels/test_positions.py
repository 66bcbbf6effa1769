"""Products of positions, whose rows repeat: kept rows must equal computed rows to the last bit. The layer is recognised
by the name of its node."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import layer_model, random_matrix, session_with

from u2moe.quantize.arithmetic import int8_columns
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.packing import pack_graph, save_mapped
from u2moe.runtime.model.native import installed_kernels

POSITIONS, OTHERS = (f"encoder/encoders.3/self_attn/linear_{name}/Int8MatMul" for name in ("pos", "q"))
INNER, COLUMNS, MOST, PLACES = 70, 40, 512, 16
"""`MOST` rows are kept, each at one of `PLACES`, chosen by its first 64 bytes and its scale."""
FED = {"q": np.uint8, "row_scale": np.float32}


def product(name, columns=COLUMNS):
    weight, scale = int8_columns(random_matrix(np.random.default_rng(0), INNER, columns))
    content = layer_model(Int8Conversion().product_of_rows(), FED, {"weight": weight, "scale": scale}, {})
    model = onnx.load_from_string(content)
    model.graph.node[0].name = name
    return model.SerializeToString()


@pytest.fixture(scope="module")
def models():
    """Build the same product as one of positions and as another."""
    return [product(name) for name in (POSITIONS, OTHERS)]


def rows_of(numbers):
    """Return the row of each number. Of every seven rows, some differ only in the last byte or in the scale."""
    numbers = np.asarray(numbers)
    q = np.random.default_rng(1).integers(1, 256, (1 + numbers.max(initial=0) // 7, INNER), np.uint8)[numbers // 7]
    q[..., -1] = numbers % 7 // 2 + 1
    return {"q": q, "row_scale": (1 + numbers % 2)[..., np.newaxis].astype(np.float32)}


FIRSTS = st.lists(st.integers(0, 800), min_size=5, max_size=5)
SEQUENCES = st.tuples(st.tuples(st.integers(0, 5), st.integers(0, 90)), FIRSTS)
CALLS = st.lists(st.one_of(SEQUENCES, st.just(((1, MOST + 60), [3] * 5))), min_size=2, max_size=8)
"""Calls like those of streams: runs of neighbouring positions in any order, some of them long."""


def run(session, call):
    (num_streams, time), firsts = call
    numbers = np.array(firsts)[:num_streams, np.newaxis] + np.arange(time)
    return session.run(None, rows_of(numbers.reshape(num_streams, time)))[0]


@pytest.mark.slow
@given(CALLS)
def test_streams_in_any_order_change_no_bit(library, models, calls):
    """Batches grow and shrink, streams reset and alternate, chunks have any size, and there are more rows than are
    kept."""
    positions, others = (session_with(model, library) for model in models)
    for call in calls:
        np.testing.assert_array_equal(run(positions, call), run(others, call))


def test_rows_that_share_their_places_or_have_no_numbers_change_no_bit(library, models):
    """Rows are equal in what is compared first, and twice as many as places; some occur twice in a call."""
    positions, others = (session_with(model, library) for model in models)
    random = np.random.default_rng(2)
    rows = np.tile(random.integers(1, 256, INNER, np.uint8), (2 * PLACES, 1))
    rows[:, -1] = 1 + np.arange(2 * PLACES)
    for _ in range(12):
        feeds = {"q": rows[random.integers(0, len(rows), 24)], "row_scale": np.ones((24, 1), np.float32)}
        np.testing.assert_array_equal(*(session.run(None, feeds)[0] for session in (positions, others)))
    positions, others = (session_with(model, library) for model in models)
    feeds = rows_of([0, 0, 0, 0])
    for scales in ([np.nan, 0, -0.0, 1], [0, np.nan, 1, -0.0]):
        feeds["row_scale"] = np.array(scales, np.float32)[:, np.newaxis]
        found, expected = (session.run(None, feeds)[0].view(np.int32) for session in (positions, others))
        np.testing.assert_array_equal(found, expected)


def test_threads_that_share_a_session_change_no_bit(library):
    """Only one call at a time uses the kept rows; the others compute all of theirs."""
    # the thread sanitizer finds errors in the first calls, and is slow
    count, columns = (12, 200) if os.environ.get("LD_PRELOAD") else (200, 3000)
    positions, others = (session_with(product(name, columns=columns), library) for name in (POSITIONS, OTHERS))
    random = np.random.default_rng(3)
    calls = [rows_of(random.integers(0, 4 * MOST, 300)) for _ in range(8)]
    expected = [others.run(None, feeds)[0] for feeds in calls]

    def is_equal(number):
        return np.array_equal(positions.run(None, calls[number % 8])[0], expected[number % 8])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_equal, range(count)))


@pytest.mark.skipif(sys.platform != "linux", reason="whether mapped memory follows its file depends on the system")
@pytest.mark.parametrize("is_of_positions", [True, False])
def test_only_positions_are_kept_and_new_rows_are_computed(library, models, tmp_path, is_of_positions):
    """Packed weights change in their file: rows that are computed again become zero."""
    model = ir.from_proto(onnx.load_from_string(models[0 if is_of_positions else 1]))
    assert pack_graph(model, installed_kernels().layout) == 1
    save_mapped(model, tmp_path / "layer.onnx")
    session = session_with(tmp_path / "layer.onnx", library)
    before = run(session, ((1, 64), [16] * 5))[0]
    with (tmp_path / "layer.onnx.data").open("r+b") as weights:
        weights.write(bytes((tmp_path / "layer.onnx.data").stat().st_size))
    after = run(session, ((2, 64), [32, 200] * 3))
    np.testing.assert_array_equal(after[0, :48], before[16:] if is_of_positions else 0)
    np.testing.assert_array_equal(after[0, 48:], 0)
    np.testing.assert_array_equal(after[1], 0)
    run(session, ((1, 4 * MOST), [1000] * 5))
    np.testing.assert_array_equal(run(session, ((1, 20), [16] * 5)), 0)  # these rows were dropped
