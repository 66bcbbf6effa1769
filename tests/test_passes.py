"""Replacement of layers by quantization: which layers and how, what is refused, what remains, and groups of weights."""

import re
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.quantize import inspect_bundle, quantize_bundle, recipe
from u2moe.quantize.passes import quantize_graph
from u2moe.runtime import Bundle, BundleError
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.file import group_of, save_graph, with_external


def layers_of(model):
    return Counter(plain_name(node.op_type) for node in model.graph if node.domain == "u2moe")


def test_every_product_is_quantized_once_and_only_ours(exported):
    def graph_of(name):
        return ir.load(exported("moe_tiny") / f"{name}.onnx")

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
    encoder = graph_of("encoder")
    quantize_graph(encoder, recipe("int8-experts"))
    with pytest.raises(BundleError, match=r"feed_forward.*: Int8MixtureOfExperts is not a float32 layer"):
        quantize_graph(encoder, recipe("int8-experts"))
    model = graph_of("encoder")
    next(node for node in model.graph if node.domain == "u2moe").op_type = "LinearOfTomorrow"
    with pytest.raises(BundleError, match="LinearOfTomorrow is not a float32 layer"):
        quantize_graph(model, recipe("int8"))


@pytest.mark.parametrize(("arguments", "names"), [
    ({}, {"CachedAttention", "CachedConvolution", "FeedForward", "AddNormalization"}),
    ({"encoder_conf": {"n_kv_head": 2, "head_dim": 8, "cnn_module_norm": "batch_norm"}}, {"CachedConvolution"}),
    ({"encoder_conf": {"layer_norm_type": "rms_norm", "cnn_module_norm": "rms_norm"}},
     {"RmsNormalization", "Activation"}),
    ({"encoder_conf": {"cnn_module_kernel": 1}}, {"Convolution"}),
    ({"encoder_conf": {"causal": False, "cnn_module_kernel": 7}}, {"Attention", "Convolution"}),
    ({"encoder": "transformer"}, {"CachedAttention", "FeedForward"}),
], ids=["conformer", "shared keys, batch norm", "RMS norm", "kernel 1", "full context", "transformer"])  # fmt: skip
def test_every_layer_is_a_call(tmp_path, export_quickly, arguments, names):
    arguments = {**arguments, "encoder_conf": {"num_blocks": 1, **arguments.get("encoder_conf", {})}, "decoder": None}
    write_random_checkpoint(tmp_path / "checkpoint", random_config(**arguments))
    model = ir.load(export_quickly(tmp_path / "checkpoint", tmp_path / "bundle") / "encoder.onnx")
    assert names | {"Subsampling", "Linear"} <= layers_of(model).keys() <= layers.PLAIN_LAYERS | {"MixtureOfExperts"}
    plain = {node.op_type for node in model.graph if not node.domain}
    assert not plain & {"MatMul", "Conv", "LayerNormalization", "Softmax", "Sigmoid", "Relu", "Erf"}


def quantized_graph(build):
    g = GraphBuilder("one")
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("rows", 8))
    with g.scope("layer", group="feed_forward"):
        y = build(g, x)
    graph = ir.Graph([x], [y], nodes=g.tape.nodes, initializers=g.tape.initializers, opset_imports={"": 18}, name="g")
    quantize_graph(ir.Model(graph, ir_version=8, functions=list(g.functions.values())), recipe("int8"))
    return list(graph)


def weight(g, name, *shape):
    return g.weight(name, shape, lambda: np.ones(shape, np.float32))


def affine(g, name, *shape, bias=True):
    return [weight(g, f"{name}.weight", *shape), *([weight(g, f"{name}.bias", shape[1])] if bias else [])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_a_feed_forward_layer_stays_one_function(kind, bias, gated):
    def build(g, x):
        weights = [*affine(g, "a", 8, 16, bias=bias), *affine(g, "bb", 16, 8, bias=bias)]
        gate = [weight(g, "ccc", 8, 16)] if gated else []
        return g.call(layers.feed_forward(kind, bias=bias, gated=gated), x, *gate, *weights)[0]

    (node,) = quantized_graph(build)
    assert node.op_type == ("Int8GatedFeedForward" if gated else "Int8FeedForward")
    assert node.attributes["activation"].as_string() == kind
    assert len(node.inputs) == (7 if bias else 5) + 2 * gated


@pytest.mark.parametrize(("kind", "known"), [("relu", "relu"), ("swish", "swish"), ("gelu", ""), ("tanh", "")])
def test_the_lowest_value_of_an_activation_before_a_product_is_used(kind, known):
    def build(g, x):
        return g.call(layers.linear(bias=True), g.call(layers.activation_layer(kind), x)[0], *affine(g, "a", 8, 8))[0]

    linear = next(node for node in quantized_graph(build) if node.op_type == "Int8Linear")
    assert linear.attributes["activation"].value == known


GATE = re.compile(r"\.feed_forward(_macaron)?\.gate\.")
GATED = {"mlp_type": "gated", "linear_units": 32, "attention_heads": 2, "num_blocks": 1}
MIXTURE = {**GATED, "mlp_type": "moe", "n_expert": 4, "n_expert_activated": 2}


@pytest.fixture(scope="module", params=["gated", "gated-mixture"])
def float32(request, tmp_path_factory, export_quickly):
    folder, has_mixtures = tmp_path_factory.mktemp(request.param), request.param == "gated-mixture"
    encoder = {**(MIXTURE if has_mixtures else GATED), "output_size": 16, "cnn_module_kernel": 3}
    sizes = {"vocab_size": 20, "num_mel_bins": 20}
    config = random_config(decoder="transformer", encoder_conf=encoder, decoder_conf=GATED, **sizes)
    write_random_checkpoint(folder / "checkpoint", config, seed=0)
    return has_mixtures, export_quickly(folder / "checkpoint", folder / "bundle")


def models_of(path):
    return {graph.name: ir.load(path / graph.file) for graph in Bundle.open(path).manifest.model.graphs()}


def weights_of(path):
    return [(name, value) for name, model in models_of(path).items() for value in model.graph.initializers.values()]


def test_a_gate_is_no_router(float32, tmp_path):
    has_mixtures, path = float32
    bundle, _ = quantize_bundle(path, tmp_path / "out", recipe("int8"))
    for folder in (path, bundle.path):
        assert inspect_bundle(folder)["parameters"].get("routers", 0) == has_mixtures * 2 * 16 * 4
        gates = [(graph, value) for graph, value in weights_of(folder) if GATE.search(value.name)]
        encoder = "routers" if has_mixtures else "feed_forward"
        groups = {(graph, group_of(value)) for graph, value in gates}
        assert groups == {("encoder", encoder), ("decoder", "feed_forward")}
    for graph, value in gates:
        stays = has_mixtures and graph == "encoder"
        assert value.const_value.dtype in ((ir.DataType.FLOAT,) if stays else (ir.DataType.INT8, ir.DataType.FLOAT))
        assert value.name.endswith("weight") == stays


def test_every_weight_says_its_group_or_is_refused(float32):
    has_mixtures, path = float32
    counts = Counter()
    for _, value in weights_of(path):
        is_constant = value.name.startswith("const_")
        assert (contract.GROUP_METADATA in value.metadata_props) == (not is_constant), value.name
        assert (group_of(value) in contract.WEIGHT_GROUPS) == (not is_constant)
        counts[group_of(value)] += not is_constant
    expected = set(contract.WEIGHT_GROUPS) - (set() if has_mixtures else {"experts", "routers"})
    assert {group for group, count in counts.items() if count} == expected
    g = GraphBuilder("test")
    with g.scope("layer"), pytest.raises(ValueError, match=r"weight layer\.w: no enclosing scope has a group"):
        g.weight("w", (1,), lambda: np.zeros(1, np.float32))
    with g.scope("layer", group="attention"), g.scope("inner"):
        assert group_of(g.weight("w", (1,), lambda: np.zeros(1, np.float32))) == "attention"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4-experts", "fp16"])
def test_groups_survive_quantization_and_nothing_that_nothing_reads(exported, quantized, name):
    before = {value.name: group_of(value) for _, value in weights_of(exported("moe_tiny"))}
    for model in models_of(quantized(name).path).values():
        assert {node.op_identifier() for node in model.graph if node.domain == "u2moe"} == model.functions.keys()
        for value in model.graph.initializers.values():
            stem = re.sub(r"(\.(int8|int4|steps|scale|rows|half))+$", "", value.name)
            assert name != "int4-experts" or group_of(value) == before.get(stem, "other"), value.name
            assert value.uses(), value.name


def test_the_manifest_says_all_of_weights_beside_the_graph(float32, tmp_path):
    _, path = float32
    manifest = Bundle.open(path).manifest
    for graph in models_of(path).values():
        save_graph(graph, tmp_path / f"{graph.graph.name}.onnx", limit=0)
    for file, tensors in with_external(manifest, tmp_path).external.items():
        model = onnx.load(tmp_path / file, load_external_data=False)
        stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
        groups = {value.name: group_of(value) for value in ir.load(tmp_path / file).graph.initializers.values()}
        assert [tensor.name for tensor in tensors] == list(stored) != []
        for tensor in tensors:
            entries = {entry.key: entry.value for entry in stored[tensor.name].external_data}
            expected = {"location": tensor.file, "offset": str(tensor.offset), "length": str(tensor.length)}
            assert entries == expected
            assert list(tensor.shape) == list(stored[tensor.name].dims)
            assert np.dtype(tensor.type) == onnx.helper.tensor_dtype_to_np_dtype(stored[tensor.name].data_type)
            assert tensor.group == groups[tensor.name]
            calls = [node for node in model.graph.node if tensor.name in node.input]
            assert set(tensor.read_by) == {node.op_type if node.domain == "u2moe" else "" for node in calls}
