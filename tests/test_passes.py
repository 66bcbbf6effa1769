"""What rewrites of quantization refuse, what they promise, and what they leave behind."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.quantize import quantize_bundle, recipe
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.passes.attention import GroupAttention
from u2moe.quantize.passes.embeddings import QuantizeEmbeddings
from u2moe.quantize.passes.experts import QuantizeExperts
from u2moe.quantize.passes.front_end import QuantizeFrontEnd
from u2moe.quantize.passes.normalization import GroupNormalization
from u2moe.quantize.passes.products import QuantizeProducts
from u2moe.quantize.passes.streamed_convolution import GroupConvolution
from u2moe.runtime import BundleError


@pytest.fixture
def graph_of(exported):
    """A function from the name of a graph of moe_tiny to a model of its own."""
    return lambda name: ir.load(exported("moe_tiny") / f"{name}.onnx")


def test_what_is_quantized_already_is_refused(graph_of):
    model = graph_of("encoder")
    quantize_graph(model, recipe("int8-experts"))
    with pytest.raises(
        BundleError, match=r"feed_forward.*: Int8MixtureOfExperts is not a mixture of experts in float32"
    ):
        quantize_graph(model, recipe("int8-experts"))


def test_functions_of_others_are_refused(graph_of):
    model = graph_of("encoder")
    node = next(node for node in model.graph if node.domain == "u2moe")
    node.op_type = "MixtureOfExperts_of_tomorrow"
    node.attributes.clear()
    with pytest.raises(
        BundleError, match="MixtureOfExperts_of_tomorrow: is not a mixture of experts that this version knows"
    ):
        quantize_graph(model, recipe("int8"))


def test_a_front_end_of_another_kind_is_refused(graph_of):
    model = graph_of("encoder")
    convolutions = [node for node in model.graph if node.op_type == "Conv" and "/embed/" in node.name]
    flatten = next(node for node in model.graph if node.op_type == "Reshape" and "/embed/" in node.name)
    relu = ir.node("Relu", [flatten.outputs[0]])
    flatten.outputs[0].replace_all_uses_with(relu.outputs[0])
    relu.replace_input_with(0, flatten.outputs[0])
    model.graph.insert_after(flatten, relu)
    with pytest.raises(BundleError, match="found Relu, expected the projection of the front end"):
        quantize_graph(model, recipe("int8"))
    assert len(convolutions) == 2
    assert {node.graph for node in convolutions} == {model.graph}  # nothing has been rewritten


@pytest.mark.parametrize(
    ("kind", "graph", "message"),
    [
        (QuantizeExperts, "encoder", "experts are in fp32"),
        (QuantizeFrontEnd, "encoder", "encoder/embed/conv.0/Conv: is in float32"),
        (QuantizeProducts, "ctc", "ctc_lo/MatMul: its weight is in float32"),
        (QuantizeEmbeddings, "decoder", "Gather: its table is in float32"),
        (GroupAttention, "encoder", "cache/Gather: reads att_cache"),
    ],
)
def test_a_rewrite_that_does_not_do_what_it_promises_is_found_out(graph_of, monkeypatch, kind, graph, message):
    monkeypatch.setattr(kind, "rewrite", lambda *_: False)
    with pytest.raises(BundleError, match=message):
        quantize_graph(graph_of(graph), recipe("int8"))


def _of_convolution(model, op_type):
    """Nodes of the first block's convolution over time."""
    return next(node for node in model.graph if node.op_type == op_type and "encoders.0/conv_module" in node.name)


def _wider(model):
    _of_convolution(model, "Conv").attributes["pads"] = ir.AttrInt64s("pads", [0, 1, 0, 1])


def _dilated(model):
    _of_convolution(model, "Conv").attributes["dilations"] = ir.AttrInt64s("dilations", [1, 2])


def _keeps_one_more(model):
    node = _of_convolution(model, "Slice")
    start = node.inputs[1].const_value.numpy() - 1
    other = ir.Value(name="start", shape=ir.Shape([1]), const_value=ir.tensor(start, name="start"))
    model.graph.register_initializer(other)
    node.replace_input_with(1, other)


@pytest.mark.parametrize("change", [_wider, _dilated, _keeps_one_more])
def test_a_convolution_of_another_form_stays_as_it_is(graph_of, change):
    model = graph_of("encoder")
    change(model)
    quantize_graph(model, recipe("int8"))
    calls = [node.op_type for node in model.graph]
    assert calls.count("CachedConvolution") == calls.count("CachedAttention") - 1
    assert calls.count("Conv") >= 1


def test_a_constant_is_no_residual_of_a_normalisation(graph_of):
    """It may have another shape than the branch, which the native operator would refuse."""
    model = graph_of("encoder")
    total = next(node for node in model.graph if node.op_type == "Add" and "encoders.0" in node.name)
    while not any(use.node.op_type == "LayerNormalization" for use in total.outputs[0].uses()):
        total = next(use.node for use in total.outputs[0].uses() if use.node.op_type == "Add")
    one = ir.Value(name="one", shape=ir.Shape([1]), const_value=ir.tensor(np.ones(1, np.float32), name="one"))
    model.graph.register_initializer(one)
    before = _calls(graph_of("encoder"))
    total.replace_input_with(0, one)
    assert _calls(model)["AddNormalization"] == before["AddNormalization"] - 1


def _calls(model):
    quantize_graph(model, recipe("int8"))
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("name", ["int8", "int4-experts", "fp16"])
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_nothing_is_left_that_nothing_reads(graph_of, name, graph):
    model = graph_of(graph)
    changes = quantize_graph(model, recipe(name))
    for initializer in model.graph.initializers.values():
        assert initializer.uses(), initializer.name
    assert {node.op_identifier() for node in model.graph if node.domain == "u2moe"} == model.functions.keys()
    assert changes.keys() <= model.graph.initializers.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"encoder_conf": {"n_kv_head": 2, "head_dim": 8}},
        {"encoder_conf": {"cnn_module_norm": "batch_norm"}},
        {"encoder_conf": {"layer_norm_type": "rms_norm", "cnn_module_norm": "rms_norm"}},
        {"encoder_conf": {"cnn_module_kernel": 1}},
        {"encoder": "transformer"},
    ],
    ids=["conformer", "shared keys", "batch norm", "RMS norm", "kernel 1", "transformer"],
)
def test_parts_of_blocks_in_one_call_change_no_number(tmp_path, export_quickly, monkeypatch, arguments):
    write_random_checkpoint(tmp_path / "checkpoint", random_config(**arguments))
    folder = export_quickly(tmp_path / "checkpoint", tmp_path / "bundle")
    grouped, _ = quantize_bundle(folder, tmp_path / "grouped", recipe("int8"))
    for kind in (GroupAttention, GroupConvolution, GroupNormalization):
        monkeypatch.setattr(kind, "rewrite", lambda *_: False)
        monkeypatch.setattr(kind, "ensures", lambda *_: None)
    plain, _ = quantize_bundle(folder, tmp_path / "plain", recipe("int8"))
    calls = [node.op_type for node in ir.load(grouped.path / "encoder.onnx").graph]
    assert calls.count("CachedAttention") == grouped.manifest.model.num_blocks
    options = arguments.get("encoder_conf", {})
    has_cache = "encoder" not in arguments and options.get("cnn_module_kernel") != 1
    assert calls.count("CachedConvolution") == has_cache * grouped.manifest.model.num_blocks
    assert "Softmax" not in calls
    assert "LayerNormalization" not in calls
    frames = np.random.default_rng(0).normal(10, 3, (260, 80)).astype(np.float32)
    for chunk_size, num_left_chunks in ((None, -1), (8, 2), (8, -1), (8, 0)):
        found, expected = (
            bundle.load(kernels="onnxruntime").encode(frames, chunk_size, num_left_chunks)
            for bundle in (grouped, plain)
        )
        np.testing.assert_array_equal(found, expected)


def test_attention_of_another_form_is_refused(graph_of):
    model = graph_of("encoder")
    reshape = next(node for node in model.graph if node.op_type == "Reshape" and "self_attn/linear_q" in node.name)
    reshape.op_type = "Identity"
    reshape.resize_inputs(1)
    with pytest.raises(BundleError, match="is not divided into heads as the exporter does it"):
        quantize_graph(model, recipe("int8"))
