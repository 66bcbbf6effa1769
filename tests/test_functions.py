"""Declarations shared by graphs, quantization and native kernels: other places are derived from the tables."""

import re
import runpy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import layer_model, session_with
from quantized import IN_TORCH, LOWEST

from u2moe.runtime.bundle.functions import FUNCTIONS, MOST_NUMBERS, NATIVE, is_replaced
from u2moe.runtime.bundle.mixture import Mixture, read_mixture
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.graph.activation import ACTIVATIONS, lowest_of
from u2moe.runtime.graph.builder import build_function
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.layers import Prefixes, activation_layer, shared_prefixes

ROOT = Path(__file__).parent.parent


def test_header_and_page_of_the_kernels_are_those_of_the_tables_of_known_activations():
    made = runpy.run_path(str(ROOT / "runtime" / "kernels" / "declare.py"))
    assert made["HEADER"].read_text(encoding="utf-8") == made["header"](), "run python runtime/kernels/declare.py"
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|", page, re.MULTILINE)
    shown = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    assert [name for name in NATIVE if name not in shown] == []
    for name in NATIVE:
        if "the same" not in shown[name] and "as " not in shown[name] and "those" not in shown[name]:
            assert [each for each in FUNCTIONS[name].attributes if f"`{each}`" not in shown[name]] == [], name
    assert lowest_of("") is None
    for use in (lowest_of, activation_layer):
        with pytest.raises(ValueError, match=r"activation must be one of relu, swish, .*, got 'cube'"):
            use("cube")


def test_a_function_that_differs_from_its_declaration_is_an_error():
    message = r"function FeedForward: found attributes .* FUNCTIONS declares .* and inputs \(x, w#, w#_bias\)"
    for inputs, attributes in ((["x", "w1", "w3_scale"], {"activation": "relu", "bias": 0}), (["x"], {"bias": 0})):
        with pytest.raises(ValueError, match=message):
            build_function("FeedForward", inputs, lambda _, values: values[0], attributes)
    function = build_function("Activation", ["x"], lambda g, inputs: g.op("Relu", *inputs), {"activation": "relu"})
    assert list(ir.to_proto(function).attribute) == ["activation"]


@pytest.mark.parametrize("number", ["", "_2", f"_{MOST_NUMBERS}"])
def test_numbered_functions_are_replaced_as_far_as_operators_are_registered(number):
    assert is_replaced(f"Int8Linear{number}", NATIVE)
    assert not is_replaced(f"Linear{number}", NATIVE)
    assert not is_replaced(f"Int8Linear_1{number}", NATIVE)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_is_that_of_torch_and_no_lower_than_what_its_rows_are_quantized_for(kind):
    """The integers of a row reach equally far below and above zero, because lower values would be cut off."""
    x = np.concatenate([np.linspace(-20, 20, 4001), [-1e30, 0, 1e30]]).astype(np.float32)[np.newaxis]
    session = session_with(layer_model(activation_layer(kind), {"x": np.float32}, {}, {"activation": kind}))
    found, expected = session.run(None, {"x": x})[0], IN_TORCH[kind](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)
    if kind in LOWEST:
        lowest = float(IN_TORCH[kind](torch.linspace(-20, 1, 200_001, dtype=torch.float64)).min())
        assert LOWEST[kind] - 1e-3 < -lowest <= LOWEST[kind]


@given(st.lists(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=3, max_size=3), min_size=1, max_size=3))
def test_prefixes_are_there_once_in_each_utterance(utterances):
    """Hypotheses with a common beginning, equal or empty ones, and one that begins another."""
    session = session_with(layer_model(shared_prefixes(), dict.fromkeys(("tokens", "lens"), np.int64), {}, {}))
    tokens = np.array([[[9, *own, *[1] * (4 - len(own))] for own in each] for each in utterances])
    lens = np.array([[[len(own)] for own in each] for each in utterances])
    found = Prefixes(*session.run(None, {"tokens": tokens, "lens": lens}))
    prefixes = [{(u, *own[:n]): None for own in each for n in range(len(own) + 1)} for u, each in enumerate(utterances)]
    places = [np.unravel_index(end, tokens.shape) for end in found.ends]
    assert {(u, *tokens[u, n, 1 : last + 1]) for u, n, last in places} == {key for own in prefixes for key in own}
    assert len(places) == sum(map(len, prefixes))
    assert found.of_utterances.shape == (len(utterances), max(map(len, prefixes)))
    assert found.of_utterances.ravel()[found.places].tolist() == list(range(len(places)))
    assert (found.places // found.of_utterances.shape[1]).tolist() == [u for u, _, _ in places]
    for place in np.argwhere(np.arange(5) <= lens):
        u, n, last = places[found.of_tokens[tuple(place)]]
        assert (u, *tokens[u, n, : last + 1]) == (place[0], *tokens[place[0], place[1], : place[2] + 1])


@given(
    sizes=st.tuples(st.integers(1, 64), st.integers(1, 64)), activation=st.sampled_from(["swish", "relu", "gelu"]),
    bias=st.booleans(), weights=st.sampled_from(sorted(WEIGHT_FORMATS)), block_size=st.sampled_from([0, 16, 128]),
)  # fmt: skip
def test_a_mixture_is_read_as_it_is_written(sizes, **others):
    mixture = Mixture(num_experts=max(sizes), top_k=min(sizes), **others)
    written = ir.from_proto(ir.to_proto(ir.node(mixture.function, [], mixture.attributes(), domain="u2moe")))
    assert mixture_of(written) == mixture
    assert mixture_of(ir.node(f"{mixture.function}_2", [], mixture.attributes(), domain="u2moe")) == mixture


def test_what_is_no_mixture():
    assert read_mixture("u2moe", "Int8Rows", {"activation": "relu"}) is None
    assert read_mixture("elsewhere", "MixtureOfExperts", {}) is None
    attributes = Mixture(num_experts=8, top_k=2, activation="swish").attributes()
    with pytest.raises(ValueError, match=r"MixtureOfExperts: top_k must be between 1 and num_experts \(8\), got 9"):
        read_mixture("u2moe", "MixtureOfExperts", {**attributes, "top_k": 9})
    del attributes["activation"]
    with pytest.raises(ValueError, match="MixtureOfExperts: attribute 'activation' is missing"):
        read_mixture("u2moe", "MixtureOfExperts", attributes)
