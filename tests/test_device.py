"""Values on a device are sliced and joined like arrays. The tests run the same code in CPU memory."""

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime import ProviderError, SessionSettings
from u2moe.runtime.model.device import DeviceArray, DeviceMemory, joined
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

MEMORY = DeviceMemory(None, "CPUExecutionProvider")


def on_device(array):
    return DeviceArray(MEMORY, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))


@st.composite
def indices(draw, shape, *, with_new):
    """Draw an index for an array of this shape: integers, slices, new axes; it may omit axes."""
    found = []
    for size in shape[: draw(st.integers(0, len(shape) - 1))]:
        found += [None] * (with_new and draw(st.integers(0, 1)))
        whole = st.builds(slice, *(st.one_of(st.none(), st.integers(-size - 1, size + 1)) for _ in range(2)))
        found.append(draw(st.one_of(whole, st.integers(0, size - 1))))
    return tuple(found)


@given(st.data())
def test_indexing_is_that_of_arrays(data):
    array = np.random.default_rng(0).random((3, 4, 5, 2), np.float32)
    found, expected = on_device(array), array
    for with_new in (False, True):
        if 0 in expected.shape:
            break
        index = data.draw(indices(expected.shape, with_new=with_new))
        found, expected = found[index], expected[index]
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert found.copy().tensor.shape() == list(expected.shape)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    times=st.lists(st.integers(0, 5), min_size=20, max_size=20),
    is_array=st.lists(st.booleans(), min_size=20, max_size=20),
    axes=st.sampled_from([(0, None), (2, None), (0, 1), (1, 3), (2, 0)]),
    at_front=st.booleans(),
)
def test_joining_is_that_of_arrays(lengths, times, is_array, axes, at_front):
    axis, padded = axes
    arrays = []
    for seed, (length, time) in enumerate(zip(lengths, times, strict=False)):
        shape = [2, 3, 2, 3]
        shape[axis] = length
        if padded is not None:
            shape[padded] = time
        arrays.append(np.random.default_rng(seed).random(shape, np.float32))
    values = [array if host else on_device(array) for array, host in zip(arrays, is_array, strict=False)]
    found = np.asarray(joined(values, axis, padded=padded, at_front=at_front))
    np.testing.assert_array_equal(found, joined(arrays, axis, padded=padded, at_front=at_front))


def test_an_index_out_of_range_ends_a_loop_and_joining_that_fails_is_a_typed_error():
    with pytest.raises(IndexError, match="a new axis cannot be sliced"):
        on_device(np.eye(2, dtype=np.float32))[np.newaxis][1:]
    assert [np.asarray(row).tolist() for row in on_device(np.eye(2, dtype=np.float32))] == [[1, 0], [0, 1]]
    with pytest.raises(ProviderError, match=r"CPUExecutionProvider failed to join values: .*data type"):
        joined([on_device(np.zeros((2, 3), np.int64))] * 2, 0)


@pytest.mark.parametrize(("settings", "kind", "joiner", "number"), [
    ({}, None, None, None),
    ({"io_binding": True}, "cpu", "CPUExecutionProvider", 0),
    ({"providers": ["CUDAExecutionProvider"]}, "cuda", "CUDAExecutionProvider", 0),
    ({"providers": ["TensorrtExecutionProvider"], "provider_options": [{"device_id": "1"}]}, "cuda",
     "CUDAExecutionProvider", 1),
    ({"providers": ["OpenVINOExecutionProvider"]}, "cpu", "CPUExecutionProvider", 0),
    ({"providers": ["DmlExecutionProvider"]}, "dml", "DmlExecutionProvider", 0),
    ({"providers": ["CUDAExecutionProvider"], "io_binding": False}, None, None, None),
])  # fmt: skip
def test_the_memory_is_that_of_the_first_provider(monkeypatch, settings, kind, joiner, number):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [DEFAULT_PROVIDER, joiner, *settings.get("providers", [])]
    )
    memory = SessionSettings(**settings).memory(None)
    assert (memory and (memory._kind, memory._joiner, memory._id)) == (kind and (kind, joiner, number))
