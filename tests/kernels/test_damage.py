"""Nodes that lie about their attributes, weights and shapes: an error of onnxruntime, and never a crash."""

import os

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_layers import int4_weights, int8_weights, layer_model, session_with

from u2moe.quantize.experts.int4 import int4_mixture
from u2moe.quantize.experts.int8 import int8_mixture
from u2moe.quantize.token_scales import int8_feed_forward, int8_linear, int8_matmul, int8_rows
from u2moe.runtime.mixture import Mixture
from u2moe.runtime.session import ONNXRUNTIME_ERRORS

NUM_EXAMPLES = int(os.environ.get("U2MOE_TEST_EXAMPLES", "150"))
NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 5, 24, 65, 1025, 2**31, 2**63 - 1])
SIZES = st.sampled_from([0, 1, 2, 7, 16, 17, 40])


def layers():
    random = np.random.default_rng(0)
    int8 = Mixture(num_experts=3, top_k=2, activation="swish", weights="int8", skip_below=0.1)
    int4 = Mixture(num_experts=3, top_k=2, activation="relu", weights="int4", block_size=16)
    matrix = {"weight": np.ones((16, 24), np.int8), "scale": np.ones(24, np.float32), "bias": np.ones(24, np.float32)}
    second = {"w2": np.ones((24, 16), np.int8), "w2_scale": np.ones(16, np.float32), "w2_bias": np.ones(16, np.float32)}
    both = {"w1": matrix["weight"], "w1_scale": matrix["scale"], "w1_bias": matrix["bias"], **second}
    kind = {"activation": "swish"}
    rows = {"q": np.uint8, "peak": np.float32}
    return [
        (int8_mixture(int8), {"x": np.float32}, int8_weights(random, int8, 16, 24), int8.attributes()),
        (int4_mixture(int4, 16, 24), {"x": np.float32}, int4_weights(random, int4, 16, 24), int4.attributes()),
        (int8_rows("swish"), {"x": np.float32}, {}, kind),
        (int8_matmul(bias=True), rows, matrix, {}),
        (int8_linear("swish", bias=True), {"x": np.float32}, matrix, kind),
        (int8_feed_forward("swish", bias=True), {"x": np.float32}, both, {**kind, "bias": 1}),
    ]


LAYERS = [onnx.load_from_string(layer_model(*layer)) for layer in layers()]


def feeds_of(model, size):
    kinds = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.UINT8: np.uint8}
    names = {value.name: kinds[value.type.tensor_type.elem_type] for value in model.graph.input}
    return {name: np.ones((2, 1 if name == "peak" else size), kind) for name, kind in names.items()}


def damage_attribute(data, node):
    attribute = data.draw(st.sampled_from(list(node.attribute)))
    action = data.draw(st.sampled_from(["remove", "number", "text", "float"]))
    name = attribute.name
    node.attribute.remove(attribute)
    if action == "number":
        node.attribute.append(onnx.helper.make_attribute(name, data.draw(NUMBERS)))
    elif action == "text":
        node.attribute.append(onnx.helper.make_attribute(name, data.draw(st.text(max_size=300))))
    elif action == "float":
        node.attribute.append(onnx.helper.make_attribute(name, data.draw(st.floats(width=32))))


def damage_weight(data, graph):
    tensor = data.draw(st.sampled_from(list(graph.initializer)))
    shape = data.draw(st.lists(SIZES, max_size=4))
    kind = data.draw(st.sampled_from([np.int8, np.uint8, np.float32, np.int64]))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, kind), tensor.name))


def damage_inputs(data, graph):
    node = graph.node[0]
    if not node.input:
        return
    position = data.draw(st.integers(0, len(node.input) - 1))
    action = data.draw(st.sampled_from(["remove", "swap", "repeat", "empty", "cut"]))
    if action == "remove":
        del node.input[position]
    elif action == "cut":
        del node.input[position:]
    elif action == "swap":
        other = data.draw(st.integers(0, len(node.input) - 1))
        node.input[position], node.input[other] = node.input[other], node.input[position]
    elif action == "repeat":
        node.input.append(node.input[position])
    else:
        node.input[position] = ""


@given(st.data())
@settings(max_examples=NUM_EXAMPLES)
def test_a_damaged_layer_is_an_error_or_computes_something(library, data):
    model = onnx.ModelProto()
    model.CopyFrom(data.draw(st.sampled_from(LAYERS)))
    for _ in range(data.draw(st.integers(1, 2))):
        ways = [damage_inputs] + [damage_weight] * bool(model.graph.initializer)
        way = data.draw(st.sampled_from(ways + [damage_attribute] * bool(model.graph.node[0].attribute)))
        way(data, model.graph.node[0] if way is damage_attribute else model.graph)
    try:
        session = session_with(model.SerializeToString(), library)
        session.run(None, feeds_of(model, data.draw(st.sampled_from([16, 16, 16, 0, 1, 17]))))
    except ONNXRUNTIME_ERRORS:
        return


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("top_k", 4, "top_k must be from 1 to 3, got 4"),
        ("num_experts", 2000, "num_experts must be from 1 to 1024, got 2000"),
        ("activation", "mish", "activation must be relu, swish, gelu, tanh, hardtanh or selu, got 'mish'"),
        ("bias", 0, r"input 2 \(weight\) must be of element type 3"),
    ],
)
def test_an_error_says_what_was_expected(library, attribute, value, message):
    model = onnx.ModelProto()
    model.CopyFrom(LAYERS[0])
    (found,) = (own for own in model.graph.node[0].attribute if own.name == attribute)
    found.CopyFrom(onnx.helper.make_attribute(attribute, value))
    with pytest.raises(ONNXRUNTIME_ERRORS, match=message):
        session_with(model.SerializeToString(), library)


def test_rows_of_another_size_are_an_error_when_it_runs(library):
    session = session_with(LAYERS[0].SerializeToString(), library)
    with pytest.raises(ONNXRUNTIME_ERRORS, match=r"input 0 must be \[\.\.\., 16\]"):
        session.run(None, {"x": np.ones((2, 17), np.float32)})
