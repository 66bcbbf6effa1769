"""Rounding numbers to integers, and restoring them."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from u2moe.quantize.arithmetic import NOTHING, from_int4_blocks, int4_blocks, int8_columns, int8_rows, relative_error
from u2moe.runtime import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.graph.file import group_of

MATRICES = arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(1, 9)), elements=st.floats(-100, 100, width=32))


def test_int8_weights_have_all_levels_and_int4_is_better_than_a_float_for_every_block():
    integers, _ = int8_columns(np.array([[1, 0.5, 1], [-1, 0.25, 1], [0.5, -0.125, 1]], np.float32))
    np.testing.assert_array_equal(integers, [[127, 85, 64], [-127, 42, 64], [64, -21, 64]])
    # Symmetric weights with the best of six float32 scales per block of 32 have an error of 0.0824
    weight = np.random.default_rng(1).standard_normal((576, 100)).astype(np.float32)
    made = int4_blocks(weight, 32)
    assert relative_error(weight, from_int4_blocks(made, 576)) < 0.0815
    assert np.abs(from_int4_blocks(made._replace(scale=np.ones(100, np.float32)), 576)).max() <= 127


@given(MATRICES)
def test_int8_rows_have_a_scale_each_and_room_in_pairs(fits_16_bits, weight):
    integers, scale = int8_rows(weight)
    assert scale.shape == (len(weight), 1)
    assert (np.abs(integers * scale - weight) <= scale * 0.501).all()
    assert (np.abs(integers).max(axis=1) == 127 * (np.abs(weight).max(axis=1) > NOTHING)).all()
    # A column is within half a step and symmetric, and also uses the full range of 8 bits, or of a pair
    integers, scale = int8_columns(weight)
    assert integers.min() >= -127
    assert (np.abs(integers * scale - weight) <= scale * 0.501).all()
    np.testing.assert_array_equal(int8_columns(-weight)[0], -integers)
    assert fits_16_bits(integers)
    pairs = [integers[index : index + 2].sum(axis=0, dtype=int) for index in range(0, len(integers), 2)]
    used = np.maximum(np.abs(integers).max(axis=0), np.abs(pairs).max(axis=0))
    assert (used[np.abs(weight).max(axis=0) > NOTHING] >= 126).all()


@given(MATRICES, st.sampled_from([16, 32, 64]))
def test_int4_is_at_least_as_good_as_plain_rounding(weight, block_size):
    """This is checked in every block. Its step is that of its weights, rounded up to the steps of its column."""
    made = int4_blocks(weight, block_size)
    restored = from_int4_blocks(made, len(weight))
    for block in range(made.steps.shape[1]):
        rows = slice(block * block_size, (block + 1) * block_size)
        largest = np.abs(weight[rows]).max(axis=0)
        error = np.square(restored[rows] - weight[rows], dtype=np.float64).sum(axis=0)
        assert (error <= block_size * np.square(0.501 * (largest / 7 + made.scale)) + NOTHING).all()


@pytest.mark.slow
def test_every_weight_of_the_demo_model_leaves_room_in_pairs(fits_16_bits):
    counts, weights = Bundle.open(DEMO_FOLDER).manifest.quantization["num_weights"], {}
    for file in DEMO_FOLDER.glob("*.onnx"):
        for name, value in ir.load(file).graph.initializers.items():
            if value.dtype == ir.DataType.INT8 and group_of(value) != "embeddings":
                weights[f"{file.name}: {name}"] = value.const_value.numpy()
    assert len(weights) == sum(count for group, count in counts.items() if group != "embeddings") > 250
    assert [name for name, array in weights.items() if not fits_16_bits(array)] == []
