"""The attributes of a mixture of experts in a graph: written and read."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.bundle.mixture import Mixture, read_mixture
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.graph.builder import build_function, define
from u2moe.runtime.graph.dispatch import float_mixture, mixture_of

MIXTURES = st.builds(
    lambda num_experts, share, **others: Mixture(
        num_experts=num_experts, top_k=max(1, round(share * num_experts)), **others
    ),
    st.integers(1, 64),
    st.floats(0, 1),
    activation=st.sampled_from(["swish", "relu", "gelu"]),
    bias=st.booleans(),
    weights=st.sampled_from(sorted(WEIGHT_FORMATS)),
    block_size=st.sampled_from([0, 16, 128]),
)


@given(MIXTURES)
def test_a_mixture_is_read_as_it_is_written(mixture):
    written = ir.from_proto(ir.to_proto(ir.node(mixture.function, [], mixture.attributes(), domain="u2moe")))
    assert mixture_of(written) == mixture
    assert mixture_of(ir.node(f"{mixture.function}_2", [], mixture.attributes(), domain="u2moe")) == mixture


def test_what_is_no_mixture_and_attributes_of_functions_that_are_declared():
    assert read_mixture("u2moe", "Int8Rows", {"activation": "relu"}) is None
    assert read_mixture("elsewhere", "MixtureOfExperts", {}) is None
    attributes = Mixture(num_experts=8, top_k=2, activation="swish").attributes()
    with pytest.raises(ValueError, match=r"MixtureOfExperts: top_k must be between 1 and num_experts \(8\), got 9"):
        read_mixture("u2moe", "MixtureOfExperts", {**attributes, "top_k": 9})
    del attributes["activation"]
    with pytest.raises(ValueError, match="MixtureOfExperts: attribute 'activation' is missing"):
        read_mixture("u2moe", "MixtureOfExperts", attributes)
    function = build_function("Activation", ["x"], lambda g, inputs: g.op("Relu", *inputs), {"activation": "relu"})
    assert list(ir.to_proto(function).attribute) == ["activation"]


def test_two_bodies_of_one_name_get_a_number(session_of):
    functions = {}
    mixtures = [Mixture(num_experts=2, top_k=top_k, activation="relu", bias=False) for top_k in (1, 2)]
    first, second, again = (define(functions, float_mixture(mixture)) for mixture in (*mixtures, mixtures[0]))
    assert (first.name, second.name) == ("MixtureOfExperts", "MixtureOfExperts_2")
    assert again is first
    assert len(functions) == 2
    identity = np.eye(3, dtype=np.float32)
    weights = {"gate": np.array([[1, 0], [0, 0], [0, 1]], np.float32), "a": identity, "b": identity}
    weights |= {"c": 3 * identity, "d": identity}
    x = np.array([[2, 1, 0]], np.float32)
    likelier = 1 / (1 + np.exp(-2))
    for function, factor in ((first, 1), (second, likelier + 3 * (1 - likelier))):
        session = session_of([function], {"x": 2}, weights)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], factor * x, rtol=1e-6)
