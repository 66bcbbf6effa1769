"""Nodes that lie about their attributes, weights and shapes: an error of onnxruntime, and never a crash."""

import numpy as np
import onnx
import pytest
from damage import NUM_INPUTS, tried
from damaged_layers import use_damaged_layers
from layers import mixture_model, mixture_weights, session_with

from u2moe.runtime.bundle.functions import NATIVE
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.model.session import ONNXRUNTIME_ERRORS

MIXTURE = Mixture(num_experts=3, top_k=2, activation="swish", weights="int8")
WEIGHTS = mixture_weights(np.random.default_rng(0), MIXTURE, 16, 24)
LAYER = mixture_model(MIXTURE, WEIGHTS, 16, 24)


def test_layers_of_all_operators_are_drawn(operators):
    assert operators <= set(NATIVE)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", [150, pytest.param(NUM_INPUTS, marks=pytest.mark.endurance)])
def test_a_damaged_layer_is_an_error_or_computes_something(library, count, tmp_path):
    outcomes = tried(use_damaged_layers(library, tmp_path), ONNXRUNTIME_ERRORS, count, tmp_path)
    assert set(outcomes) == {"accepted", "refused"}


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("top_k", 4, "top_k must be from 1 to 3, got 4"),
        ("num_experts", 2000, "num_experts must be from 1 to 1024, got 2000"),
        ("activation", "mish", "activation must be relu, .*, got 'mish'"),
        ("bias", 0, r"input 2 \(weight\) must be of element type 3"),
    ],
)
def test_an_error_says_what_was_expected(library, attribute, value, message):
    model = onnx.load_from_string(LAYER)
    (found,) = (own for own in model.graph.node[0].attribute if own.name == attribute)
    found.CopyFrom(onnx.helper.make_attribute(attribute, value))
    with pytest.raises(ONNXRUNTIME_ERRORS, match=message):
        session_with(model.SerializeToString(), library)


def test_rows_of_another_size_are_an_error_when_it_runs(library):
    session = session_with(LAYER, library)
    with pytest.raises(ONNXRUNTIME_ERRORS, match=r"input 0 must be \[\.\.\., 16\]"):
        session.run(None, {"x": np.ones((2, 17), np.float32)})
