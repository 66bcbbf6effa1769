"""Which products of a graph become which function, and that this changes nothing but the number of nodes."""

import collections

import numpy as np
import onnx_ir as ir
import pytest

from u2moe.quantize.config import RECIPES
from u2moe.quantize.passes import quantize_graph
from u2moe.runtime.graph.activation import ACTIVATIONS, activation
from u2moe.runtime.graph.builder import GraphBuilder


def quantized_graph(build):
    """The operators of u2moe that a graph of one input x [rows, 8] has after quantization."""
    g = GraphBuilder("one", constants_as_nodes=False)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("rows", 8))
    with g.scope("layer", group="feed_forward"):
        y = build(g, x)
    graph = ir.Graph([x], [y], nodes=g._tape.nodes, initializers=g._tape.initializers, opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=8)
    quantize_graph(model, RECIPES["int8"])
    return collections.Counter(node.op_type for node in model.graph if node.domain), model


def weight(g, name, shape):
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return g.weight(name, shape, lambda: values)


def linear(g, x, name, shape, *, bias=True):
    y = g.op("MatMul", x, weight(g, f"{name}.weight", shape))
    return g.op("Add", y, weight(g, f"{name}.bias", shape[1:])) if bias else y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_feed_forward_layer_is_one_function(kind, bias):
    found, model = quantized_graph(
        lambda g, x: linear(g, activation(g, linear(g, x, "a", (8, 16), bias=bias), kind), "bb", (16, 8), bias=bias)
    )
    assert found == {"Int8FeedForward": 1}
    (node,) = model.graph
    assert node.attributes["activation"].as_string() == kind
    assert len(node.inputs) == (7 if bias else 5)


def test_an_activation_that_others_read_stays_visible():
    def build(g, x):
        hidden = activation(g, linear(g, x, "a", (8, 8)), "relu")
        return g.op("Add", linear(g, hidden, "bb", (8, 8)), hidden)

    found, _ = quantized_graph(build)
    assert found == {"Int8Linear": 1, "Int8Linear_2": 1}


def gated(g, x, kind="swish", *, bias=True, gate_bias=False):
    gate = activation(g, linear(g, x, "a", (8, 16), bias=gate_bias), kind)
    return linear(g, g.op("Mul", gate, linear(g, x, "bb", (8, 16), bias=bias)), "ccc", (16, 8), bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_gated_layer_is_one_function(kind, bias):
    found, model = quantized_graph(lambda g, x: gated(g, x, kind, bias=bias))
    assert found == {"Int8GatedFeedForward": 1}
    (node,) = model.graph
    assert node.attributes["activation"].as_string() == kind
    assert len(node.inputs) == (9 if bias else 7)


def test_other_forms_of_layers_are_products():
    """A gate with a bias or of other rows, a first product that others read, and a layer with one bias."""
    with_bias, _ = quantized_graph(lambda g, x: gated(g, x, gate_bias=True))
    assert with_bias == {"Int8Rows": 1, "Int8MatMul": 2, "Int8Linear": 1}

    def of_other_rows(g, x):
        gate = activation(g, linear(g, g.op("Neg", x), "a", (8, 16), bias=False), "relu")
        return linear(g, g.op("Mul", gate, linear(g, x, "bb", (8, 16))), "ccc", (16, 8))

    assert "Int8GatedFeedForward" not in quantized_graph(of_other_rows)[0]

    def read_twice(g, x):
        first = linear(g, x, "bb", (8, 8))
        gate = activation(g, linear(g, x, "a", (8, 8), bias=False), "relu")
        return g.op("Add", linear(g, g.op("Mul", gate, first), "ccc", (8, 8)), first)

    assert "Int8GatedFeedForward" not in quantized_graph(read_twice)[0]

    def half(g, x):
        return linear(g, activation(g, linear(g, x, "a", (8, 16)), "relu"), "bb", (16, 8), bias=False)

    assert quantized_graph(half)[0] == {"Int8Linear": 1, "Int8Linear_2": 1}


def test_a_sum_with_another_product_is_no_bias():
    found, _ = quantized_graph(lambda g, x: g.op("Add", linear(g, x, "a", (8, 8), bias=False), x))
    assert found == {"Int8Linear": 1}
