"""Constants of a graph at file offsets that are not aligned in memory, where onnxruntime maps them."""

import numpy as np
import onnx
from layers import layer_model, random_matrix, session_with, streamed_convolution_model

from u2moe.quantize.arithmetic import int8_columns
from u2moe.quantize.formats import conversion
from u2moe.runtime.graph.convolution import TimeConvolution


def test_weights_may_lie_at_any_place_of_a_file(library, tmp_path):
    random = np.random.default_rng(8)
    weight, scale = int8_columns(random_matrix(random, 40, 50))
    weights = {"weight": weight, "scale": scale, "bias": random.standard_normal(50).astype(np.float32)}
    linear = conversion("int8").linear(40, 50, bias=True)
    model = onnx.load_from_string(layer_model(linear, {"x": np.float32}, weights, {"activation": ""}))
    x = {"x": random.standard_normal((4, 40)).astype(np.float32)}
    (expected,) = session_with(model.SerializeToString(), library).run(None, x)
    (found,) = session_with(saved_at_odd_places(model, tmp_path), library).run(None, x)
    np.testing.assert_array_equal(found, expected)


def test_inputs_may_be_constants_at_any_place_of_a_file(library, tmp_path):
    random, form = (
        np.random.default_rng(9),
        TimeConvolution(kernel=3, activation="", bias=True, norm=True, epsilon=1e-5),
    )
    model = onnx.load_from_string(streamed_convolution_model(form, 20, random))
    constants = {"gate": random.standard_normal((2, 5, 20)).astype(np.float32), "block": np.array(1)}
    constants["cache"] = random.standard_normal((2, 2, 2, 20)).astype(np.float32)
    x = {"linear": random.standard_normal((2, 5, 20)).astype(np.float32)}
    expected = session_with(model.SerializeToString(), library).run(None, x | constants)
    del model.graph.input[1:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    found = session_with(saved_at_odd_places(model, tmp_path), library).run(None, x)
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)


def saved_at_odd_places(model, folder):
    """Write a model with its constants in another file, at odd offsets."""
    data = b"odd"
    for tensor in model.graph.initializer:
        data += bytes((1 - len(data)) % 8)
        place = {"location": "weights", "offset": len(data), "length": len(tensor.raw_data)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(at)) for key, at in place.items())
        data += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
    (folder / "weights").write_bytes(data)
    onnx.save(model, folder / "layer.onnx")
    return folder / "layer.onnx"
