"""Nodes with wrong attributes, weights and shapes: an error of onnxruntime, never a crash."""

import numpy as np
import onnx
import pytest
from damage import NUM_INPUTS, tried
from damaged_layers import use_damaged_layers
from layers import (
    attention_model,
    convolutions_model,
    mixture_model,
    mixture_weights,
    session_with,
    streamed_convolution_model,
)

from u2moe.quantize.passes.front_end import FirstConvolutions, Window
from u2moe.runtime.bundle.functions import NATIVE
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.attention import Heads
from u2moe.runtime.graph.convolution import TimeConvolution
from u2moe.runtime.model.session import ONNXRUNTIME_ERRORS

MIXTURE = Mixture(num_experts=3, top_k=2, activation="swish", weights="int8")
HEADS = Heads(num_heads=2, num_kv_heads=1, size=8)
FORM = TimeConvolution(kernel=5, activation="swish", bias=True, norm=True, epsilon=1e-5)
WINDOW = Window(kernel=3, stride=2)
RANDOM = np.random.default_rng(0)
LAYERS = {
    "mixture": mixture_model(MIXTURE, mixture_weights(RANDOM, MIXTURE, 16, 24), 16, 24),
    "attention": attention_model(HEADS, relative=True),
    "convolution": streamed_convolution_model(FORM, 8, RANDOM),
    "front end": convolutions_model(FirstConvolutions(bins=23, channels=20, first=WINDOW, second=WINDOW), 40, RANDOM),
}


def test_layers_of_all_operators_are_drawn_and_rows_of_another_size_are_an_error(operators, library):
    assert operators <= set(NATIVE)
    session = session_with(LAYERS["mixture"], library)
    with pytest.raises(ONNXRUNTIME_ERRORS, match=r"input 0 must be \[\.\.\., 16\]"):
        session.run(None, {"x": np.ones((2, 17), np.float32)})


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", [100, pytest.param(NUM_INPUTS, marks=pytest.mark.endurance)])
def test_a_damaged_layer_is_an_error_or_computes_something(library, count, tmp_path):
    outcomes = tried(use_damaged_layers(library, tmp_path), ONNXRUNTIME_ERRORS, count, tmp_path)
    assert set(outcomes) == {"accepted", "refused"}


@pytest.mark.parametrize(("layer", "attribute", "value", "message"), [
    ("mixture", "top_k", 4, "top_k must be from 1 to 3, got 4"),
    ("mixture", "num_experts", 2000, "num_experts must be from 1 to 1024, got 2000"),
    ("mixture", "activation", "mish", "activation must be relu, .*, got 'mish'"),
    ("mixture", "bias", 0, r"input 2 \(weight\) must be of element type 3"),
    ("attention", "num_kv_heads", 3, "num_heads must be a multiple of num_kv_heads"),
    ("attention", "size", 0, "attribute size must be from 1"),
    ("attention", "relative", 0, "has 7 inputs, expected 6"),
    ("convolution", "kernel", 1, "attribute kernel must be from 2 to 1024, got 1"),
    ("convolution", "kernel", 6, r"input 4 \(weight\)"),
    ("convolution", "bias", 0, "has 8 inputs, expected 7"),
    ("convolution", "activation", "mish", "attribute activation must be"),
    ("convolution", "epsilon", -1.0, "attribute epsilon must be from"),
    ("front end", "bins", 2, "attribute bins is too small for the kernels"),
    ("front end", "kernels", [3], "attribute kernels must be two numbers from 1 to 64"),
    ("front end", "strides", [0, 2], "attribute strides must be two numbers from 1 to 64"),
    ("front end", "kernels", [4, 3], r"first_weight\) must be of element type 1 and shape \[17, 20\]"),
])  # fmt: skip
def test_an_error_says_what_was_expected(library, operators, layer, attribute, value, message):
    model = onnx.load_from_string(LAYERS[layer])
    if model.graph.node[0].op_type not in operators:
        pytest.skip("the layer of this instruction set is onnxruntime's")
    (found,) = (own for own in model.graph.node[0].attribute if own.name == attribute)
    found.CopyFrom(onnx.helper.make_attribute(attribute, value))
    with pytest.raises(ONNXRUNTIME_ERRORS, match=message):
        session_with(model.SerializeToString(), library)
