"""Groups of weights: set by the exporter, kept by quantization, read everywhere."""

import re
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.quantize import inspect_bundle, quantize_bundle, recipe
from u2moe.runtime import Bundle
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.file import group_of, save_graph, with_external

GATE = re.compile(r"\.feed_forward(_macaron)?\.gate\.")
SIZES = {"linear_units": 32, "attention_heads": 2, "num_blocks": 1}
ENCODER = {"output_size": 16, "cnn_module_kernel": 3, **SIZES}
MIXTURE = {"mlp_type": "moe", "n_expert": 4, "n_expert_activated": 2}
GATED = {"mlp_type": "gated"}
LAYERS = {"gated": (GATED, GATED), "gated-mixture": (MIXTURE, GATED)}
"""Feed-forward layers of encoder and decoder."""


@pytest.fixture(scope="module", params=sorted(LAYERS))
def float32(request, tmp_path_factory, export_quickly):
    encoder, decoder = LAYERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = random_config(
        decoder="transformer", encoder_conf={**ENCODER, **encoder}, decoder_conf={**SIZES, **decoder}, vocab_size=20,
        num_mel_bins=20,
    )  # fmt: skip
    write_random_checkpoint(folder / "checkpoint", config, seed=0)
    return request.param, export_quickly(folder / "checkpoint", folder / "bundle")


def weights_of(path):
    return [
        (graph.name, value)
        for graph in Bundle.open(path).manifest.model.graphs()
        for value in ir.load(path / graph.file).graph.initializers.values()
    ]


def check_gates(name, path):
    """Check that gates of gated layers are feed-forward weights and only mixtures have routers."""
    found = {(graph, group_of(value)) for graph, value in weights_of(path) if GATE.search(value.name)}
    encoder = "routers" if name == "gated-mixture" else "feed_forward"
    assert found == {("encoder", encoder), ("decoder", "feed_forward")}


def test_a_gate_is_no_router(float32, tmp_path):
    name, path = float32
    check_gates(name, path)
    bundle, _ = quantize_bundle(path, tmp_path / "out", recipe("int8"))
    check_gates(name, bundle.path)
    routers = {"gated": 0, "gated-mixture": 2 * 16 * 4}[name]
    for folder in (path, bundle.path):
        assert inspect_bundle(folder)["parameters"].get("routers", 0) == routers
    for graph, value in weights_of(bundle.path):
        if GATE.search(value.name):
            stays = name == "gated-mixture" and graph == "encoder"
            assert value.const_value.dtype in ((ir.DataType.FLOAT,) if stays else (ir.DataType.INT8, ir.DataType.FLOAT))
            assert value.name.endswith("weight") == stays


def test_every_weight_says_its_group_or_is_refused(float32):
    counts = Counter()
    for _, value in weights_of(float32[1]):
        is_constant = value.name.startswith("const_")
        assert (contract.GROUP_METADATA in value.metadata_props) == (not is_constant), value.name
        assert (group_of(value) in contract.WEIGHT_GROUPS) == (not is_constant)
        counts[group_of(value)] += not is_constant
    expected = set(contract.WEIGHT_GROUPS) - ({"experts", "routers"} if float32[0] == "gated" else set())
    assert {group for group, count in counts.items() if count} == expected
    g = GraphBuilder("test")
    with g.scope("layer"), pytest.raises(ValueError, match=r"weight layer\.w: no enclosing scope has a group"):
        g.weight("w", (1,), lambda: np.zeros(1, np.float32))
    with g.scope("layer", group="attention"), g.scope("inner"):
        assert group_of(g.weight("w", (1,), lambda: np.zeros(1, np.float32))) == "attention"


@pytest.mark.slow
def test_groups_survive_quantization(exported, quantized):
    before = {value.name: group_of(value) for _, value in weights_of(exported("moe_tiny"))}
    for _, value in weights_of(quantized("int4-experts").path):
        stem = re.sub(r"(\.(int8|int4|steps|scale|rows|half))+$", "", value.name)
        assert group_of(value) == before.get(stem, "other"), value.name


def test_the_manifest_says_all_of_weights_beside_the_graph(float32, tmp_path):
    manifest = Bundle.open(float32[1]).manifest
    for graph in manifest.model.graphs():
        save_graph(ir.load(float32[1] / graph.file), tmp_path / graph.file, limit=0)
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
