"""Replacement of layers by quantization: which layers, what is refused, and what remains."""

from collections import Counter

import onnx_ir as ir
import pytest

from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.quantize import recipe
from u2moe.quantize.passes import quantize_graph
from u2moe.runtime import BundleError
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.graph.layers import PLAIN_LAYERS


@pytest.fixture
def graph_of(exported):
    """Return a function from the name of a moe_tiny graph to a new copy of its model."""
    return lambda name: ir.load(exported("moe_tiny") / f"{name}.onnx")


def layers_of(model):
    """Count the calls of each function."""
    return Counter(plain_name(node.op_type) for node in model.graph if node.domain == "u2moe")


def test_every_product_is_quantized_once_and_only_ours(graph_of):
    encoder, before = graph_of("encoder"), layers_of(graph_of("encoder"))
    quantize_graph(encoder, recipe("int8"))
    found = layers_of(encoder)
    biases = 1  # of positions; it stays float32
    assert found["Linear"] == biases
    assert found["Int8Linear"] + found["Int8MatMul"] == before["Linear"] - biases + before["Subsampling"]
    assert found["Int8MixtureOfExperts"] == before["MixtureOfExperts"] > 0
    for name in ("CachedAttention", "CachedConvolution", "Normalization", "AddNormalization"):
        assert found[name] == before[name] > 0
    decoder = graph_of("decoder")
    quantize_graph(decoder, recipe("int8"))
    assert not layers_of(decoder).keys() & {"Linear", "Embedding", "FeedForward", "MixtureOfExperts"}
    model = graph_of("encoder")
    quantize_graph(model, recipe("int8-experts"))
    with pytest.raises(BundleError, match=r"feed_forward.*: Int8MixtureOfExperts is not a float32 layer"):
        quantize_graph(model, recipe("int8-experts"))
    model = graph_of("encoder")
    next(node for node in model.graph if node.domain == "u2moe").op_type = "LinearOfTomorrow"
    with pytest.raises(BundleError, match="LinearOfTomorrow is not a float32 layer"):
        quantize_graph(model, recipe("int8"))


@pytest.mark.parametrize("name", ["int8", "int4-experts", "fp16"])
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_nothing_is_left_that_nothing_reads(graph_of, name, graph):
    model = graph_of(graph)
    changes = quantize_graph(model, recipe(name)).changes
    for initializer in model.graph.initializers.values():
        assert initializer.uses(), initializer.name
    assert {node.op_identifier() for node in model.graph if node.domain == "u2moe"} == model.functions.keys()
    assert changes.keys() <= model.graph.initializers.keys()


@pytest.mark.parametrize(("arguments", "names"), [
    ({}, {"CachedAttention", "CachedConvolution", "FeedForward", "AddNormalization"}),
    ({"encoder_conf": {"n_kv_head": 2, "head_dim": 8}}, {"CachedAttention"}),
    ({"encoder_conf": {"cnn_module_norm": "batch_norm"}}, {"CachedConvolution"}),
    ({"encoder_conf": {"layer_norm_type": "rms_norm", "cnn_module_norm": "rms_norm"}},
     {"RmsNormalization", "Activation"}),
    ({"encoder_conf": {"cnn_module_kernel": 1}}, {"Convolution"}),
    ({"encoder_conf": {"causal": False, "cnn_module_kernel": 7}}, {"Attention", "Convolution"}),
    ({"encoder": "transformer"}, {"CachedAttention", "FeedForward"}),
], ids=["conformer", "shared keys", "batch norm", "RMS norm", "kernel 1", "full context", "transformer"])  # fmt: skip
def test_every_layer_is_a_call(tmp_path, export_quickly, arguments, names):
    write_random_checkpoint(tmp_path / "checkpoint", random_config(**arguments))
    model = ir.load(export_quickly(tmp_path / "checkpoint", tmp_path / "bundle") / "encoder.onnx")
    assert names | {"Subsampling", "Linear"} <= layers_of(model).keys() <= PLAIN_LAYERS | {"MixtureOfExperts"}
    plain = {node.op_type for node in model.graph if not node.domain}
    assert not plain & {"MatMul", "Conv", "LayerNormalization", "Softmax", "Sigmoid", "Relu", "Erf"}
