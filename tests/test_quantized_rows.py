"""The functions that replace products of a graph."""

import collections

import numpy as np
import onnx_ir as ir
import pytest

from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import RECIPES
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.builder import GraphBuilder


def quantized_graph(build, group="feed_forward"):
    """Return the layers of a graph with one input x [rows, 8] after quantization."""
    g = GraphBuilder("one")
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("rows", 8))
    with g.scope("layer", group=group):
        y = build(g, x)
    graph = ir.Graph([x], [y], nodes=g.tape.nodes, initializers=g.tape.initializers, opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=8, functions=list(g.functions.values()))
    quantize_graph(model, RECIPES["int8"])
    return collections.Counter(node.op_type for node in model.graph if node.domain), model


def weight(g, name, *shape):
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return g.weight(name, shape, lambda: values)


def affine(g, name, *shape, bias=True):
    return [weight(g, f"{name}.weight", *shape), *([weight(g, f"{name}.bias", shape[1])] if bias else [])]


def linear(g, x, name, *, bias=True):
    return g.call(layers.linear(bias=bias), x, *affine(g, name, 8, 8, bias=bias))[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_a_feed_forward_layer_stays_one_function(kind, bias, gated):
    def build(g, x):
        weights = [*affine(g, "a", 8, 16, bias=bias), *affine(g, "bb", 16, 8, bias=bias)]
        if gated:
            return g.call(layers.feed_forward(kind, bias=bias, gated=True), x, weight(g, "ccc", 8, 16), *weights)[0]
        return g.call(layers.feed_forward(kind, bias=bias), x, *weights)[0]

    found, model = quantized_graph(build)
    assert found == {"Int8GatedFeedForward" if gated else "Int8FeedForward": 1}
    (node,) = model.graph
    assert node.attributes["activation"].as_string() == kind
    assert len(node.inputs) == (7 if bias else 5) + 2 * gated


def test_rows_are_quantized_once_and_groups_without_a_name_stay():
    found, _ = quantized_graph(lambda g, x: g.op("Add", linear(g, x, "a"), linear(g, x, "bb", bias=False)))
    assert found == {"Int8Rows": 1, "Int8MatMul": 1, "Int8MatMul_2": 1}
    found, _ = quantized_graph(lambda g, x: linear(g, linear(g, x, "a"), "bb"))
    assert found == {"Int8Linear": 2}
    assert quantized_graph(lambda g, x: linear(g, x, "a"), group="positions")[0] == {"Linear": 1}


@pytest.mark.parametrize(("kind", "known"), [("relu", "relu"), ("swish", "swish"), ("gelu", ""), ("tanh", "")])
def test_the_lowest_value_of_an_activation_before_a_product_is_used(kind, known):
    _, model = quantized_graph(lambda g, x: linear(g, g.call(layers.activation_layer(kind), x)[0], "a"))
    assert next(node for node in model.graph if node.op_type == "Int8Linear").attributes["activation"].value == known
