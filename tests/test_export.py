"""Exported graphs against torch: accepted configurations, experts, distant positions, and faults that must be found."""

import dataclasses
import functools
import re
import shutil

import golden_recordings
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from wenet_directories import CONFIGURATIONS, PAIRS, Directory, configured, write_configuration

from u2moe.export import comparison, exporter, parity
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.comparison import LIMIT, LOG_PROBABILITIES
from u2moe.export.exporter import build_graphs, bundle_manifest, export_bundle, validate_bundle
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.parity import Parity
from u2moe.export.proofs import settings
from u2moe.export.training_config import parse_training_config
from u2moe.quantize import RECIPES, inspect_bundle, quantize_bundle
from u2moe.runtime import Bundle, BundleError, ParityError
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.cli import main
from u2moe.runtime.graph.dispatch import mixture_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_networks")]


@pytest.fixture(autouse=True)
def fewer_streams(monkeypatch):
    """Use one chunk size, which is enough here; `moe_export` compares all."""
    monkeypatch.setattr(parity, "CHUNKS", ((4, -1),))


@pytest.fixture(scope="module")
def moe_checkpoint(golden_checkpoint):
    return Checkpoint.open(golden_checkpoint("moe_tiny"))


@pytest.fixture(scope="module")
def moe_export(golden_checkpoint, tmp_path_factory):
    said = []
    folder = tmp_path_factory.mktemp("export") / "bundle"
    return *export_bundle(golden_checkpoint("moe_tiny"), folder, progress=said.append), said


def more_likely(model, size):
    """Add to the bias of a token in a CTC head."""
    value = model.graph.initializers["ctc.ctc_lo.bias"]
    value.const_value = ir.tensor(value.const_value.numpy() + size * np.eye(1, 60, 5, dtype=np.float32)[0])
    return model


COMBINED = {
    "moe_top_3", "one_decoder_tied", "static_and_dynamic_chunk", "sos_eos_last", "sos_unlike_eos", "bpe", "sdpa",
    "non_blank_memory_one_decoder", "shaw_linear", "kernel_31", "convolution_factor_3", "transformer_moe", "post_norm",
    "moe_gqa_rms_norm", "relu", "linear", "conformer", "transformer", "not_causal", "batch_norm", "gqa", "head_dim",
    "gated", "moe", "one_decoder", "old_layout", "shaw", "stack_n_frames", "dual_conformer", "dual_transformer",
    "rope_not_causal", "no_cmvn", "e_branchformer_not_causal", "moe_all", "moe_one_expert", "moe_top_1", "blank_last",
    "tied_embedding", "convolution_factor_4",
}  # fmt: skip
"""Networks of usual sizes; EACH_SETTING has their settings, test_experts their mixtures."""
EACH_SETTING = {f"pair_{number}" for number in (1, 3, 4, 5, 9, 12, 15, 17, 28, 38, 42, 52, 56, 73)}
"""Pairs that together contain each setting once."""


def configurations():
    """Return all of them; `make test` compares each setting once, and test_configurations all of them with WeNet. Those
    of test_model are compared there: graphs with WeNet, on recordings and their chunks."""
    known = golden_recordings.known()
    for name in CONFIGURATIONS:
        combined = name.startswith("release_") or name.endswith(("_moe", "_in_the_decoder")) or name in COMBINED
        elsewhere = combined or name in PAIRS.keys() - EACH_SETTING or name in known
        yield pytest.param(name, marks=pytest.mark.endurance if elsewhere else [])


@pytest.mark.parametrize("name", list(configurations()))
def test_every_accepted_configuration_equals_torch(name, tmp_path):
    bundle, report = export_bundle(write_configuration(name, tmp_path / "checkpoint"), tmp_path / "bundle")
    cases = {item.case for item in report.comparisons}
    assert any(case.startswith("full context") for case in cases)
    assert any(case.startswith("stream of") for case in cases) == bundle.manifest.model.streaming
    assert ("decoder, two utterances" in cases) == (bundle.manifest.model.decoder != "none")
    for graph in bundle.manifest.model.graphs():
        onnx.checker.check_model(bundle.path / graph.file, full_check=True)


@pytest.mark.parametrize(
    ("layer", "used"), [("conv2d6", [[2, 5]]), ("conv2d8", [[0, 3, 7], [6]]), ("conv2d8", [[], [1]])]
)
def test_channels_that_nothing_reads_are_left_out(layer, used, tmp_path):
    """The demo model has such channels. Where no channel has a weight, all stay."""
    directory = Directory(tmp_path / "checkpoint", encoder_conf={"input_layer": layer})
    for index, kept in enumerate(used, 1):
        name = f"encoder.embed.conv.{2 * index}.weight"
        weight = directory.state()[name]
        directory.replace({name: torch.zeros_like(weight).index_copy_(1, torch.tensor(kept).long(), weight[:, kept])})
    bundle, _ = export_bundle(directory.path, tmp_path / "bundle")
    weights = ir.load(bundle.path / "encoder.onnx").graph.initializers
    sizes = [len(kept) or 32 for kept in used] + [32]
    for index, shape in enumerate(zip(sizes, [1, *sizes], strict=False)):
        assert tuple(weights[f"encoder.embed.conv.{2 * index}.weight"].shape)[:2] == shape
    features = np.random.default_rng(0).normal(10, 3, (100, 80)).astype(np.float32)
    small = quantize_bundle(bundle.path, tmp_path / "int8", RECIPES["int8"])[0]
    expected, found = (each.load().encode(features, chunk_size=None) for each in (bundle, small))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_mixture_of_experts_is_one_node_and_one_function_that_reaches_all_experts(moe_export):
    bundle, report, _ = moe_export
    model = ir.load(bundle.path / "encoder.onnx")
    calls = [node for node in model.graph if mixture_of(node)]
    assert len(calls) == 6
    assert {node.op_type for node in calls} == {"MixtureOfExperts"}
    assert {mixture_of(node) for node in calls} == {Mixture(num_experts=8, top_k=2, activation="swish")}
    functions = [function.name for function in model.functions.values() if "Mixture" in function.name]
    assert functions == ["MixtureOfExperts"]
    assert (model.opset_imports[""], model.ir_version) == (18, 8)
    assert {node.domain for function in model.functions.values() for node in function} == {""}
    assert len(report.tokens_per_expert) == 9
    assert [layer for layer, counts in report.tokens_per_expert.items() if min(counts) == 0] == []
    assert {item.limit for item in report.comparisons if item.tensor in LOG_PROBABILITIES} == {LIMIT}


@pytest.mark.parametrize("offset", [4990, 200_000, 3_000_000])
def test_positions_have_no_end(moe_export, moe_checkpoint, offset):
    """WeNet's table ends at 5000 frames, 200 seconds; ours is computed. 3 million frames are 33 hours."""
    encoder = moe_export[0].load().encoder
    chunk = np.random.default_rng(0).normal(8, 2, (1, 67, 80)).astype(np.float32)
    tensors = encoder.start().tensors | {"cnn_cache": np.full((3, 1, 64, 7), 0.1, np.float32)}
    caches = dataclasses.replace(encoder.start(), offset=np.array([offset]), tensors=tensors)
    output, _ = encoder.step(chunk, caches, required_cache_size=-1)
    torch_caches = [{"att_cache": torch.zeros(1, 4, 0, 32), "cnn_cache": torch.full((1, 64, 7), 0.1)} for _ in range(3)]
    with torch.inference_mode():
        expected, _ = moe_checkpoint.network().encoder.forward_chunk(torch.from_numpy(chunk), offset, torch_caches, -1)
    np.testing.assert_allclose(output, expected.numpy(), atol=LIMIT)


def test_routers_that_cannot_choose_are_named_and_each_setting_is_compared(small_bundle, golden_checkpoint):
    network, folder = Checkpoint.open(golden_checkpoint("small")).network(), small_bundle.path
    gate = network.get_submodule("encoder.encoders.0.feed_forward.gate")
    gate.weight = torch.nn.Parameter(torch.zeros_like(gate.weight), requires_grad=False)
    with pytest.raises(ParityError, match="a router has near ties between experts for all 8 inputs"):
        Parity(network, folder, small_bundle.manifest, subject=folder).run()

    def settings_of(names):
        found = (parse_training_config(configured(PAIRS[name])[0]).architecture for name in names)
        return {(part, *setting) for network in found for part, own in settings(network).items() for setting in own}

    assert settings_of(EACH_SETTING) == settings_of(PAIRS)


@pytest.mark.parametrize(("tensor", "largest", "limit"), [
    ("score", 330, 3.3 * LIMIT), ("score", 50, LIMIT), ("output", 0.5, LIMIT), ("output", 3, 3 * LIMIT),
])  # fmt: skip
def test_limits_grow_with_values_and_late_with_log_probabilities(tensor, largest, limit):
    """An untrained network with tied embeddings is certain that the last token is repeated: its scores are large."""
    for difference in (0.99 * limit, 1.01 * limit):
        found = comparison.compared("case", tensor, [(np.array([largest]), np.array([largest + difference]))])
        assert found.limit == pytest.approx(limit)
        assert found.is_equal == (difference < limit)


def test_rounding_is_told_from_a_difference(golden_checkpoint, export_quickly, monkeypatch, tmp_path):
    """With a limit below single precision, each tensor is compared with torch in float64."""
    network = Checkpoint.open(golden_checkpoint("dense_tiny")).network()
    folder, said = export_quickly(golden_checkpoint("dense_tiny"), tmp_path / "bundle"), []
    for module, name, value in ((comparison, "LIMIT", 1e-9), (parity, "ROUNDING", 50), (parity, "MOST_ROUNDING", 1e6)):
        monkeypatch.setattr(module, name, value)
    compare = functools.partial(Parity, network, folder, Bundle.open(folder).manifest, subject=folder)
    exact = [item for item in compare().run(said.append).comparisons if item.rounding is not None]
    assert {"output", "log_probs", "r_att_cache", "score"} <= {item.tensor for item in exact}
    assert all(item.limit == 50 * item.rounding < 10 * LIMIT for item in exact)
    told = re.compile(r"log_probs: equal within rounding: .* in float64 .*, limit .*; torch in .*")
    assert any(map(told.fullmatch, said))
    ir.save(more_likely(ir.load(folder / "ctc.onnx"), 0.01), folder / "ctc.onnx")
    with pytest.raises(ParityError, match=r"log_probs: largest difference 0\.0\d+ between torch in float64 and onnx"):
        compare().run()


def test_a_failed_export_leaves_nothing(golden_checkpoint, monkeypatch, tmp_path):
    def shifted(network, manifest):
        for model in build_graphs(network, manifest):
            yield more_likely(model, 1) if model.graph.name == "ctc" else model

    checkpoint = golden_checkpoint("small")
    monkeypatch.setattr(exporter, "build_graphs", shifted)
    with pytest.raises(ParityError, match="log_probs") as error:
        export_bundle(checkpoint, tmp_path / "new" / "folders" / "bundle")
    # the compared folder no longer exists
    assert str(error.value).startswith(f"{checkpoint / 'final.pt'}: full context")
    assert str(tmp_path) not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_validate_compares_with_the_right_checkpoint(small_bundle, golden_checkpoint, tmp_path):
    folder = shutil.copytree(golden_checkpoint("small"), tmp_path / "checkpoint")
    state = torch.load(folder / "final.pt", weights_only=True)
    torch.save(state | {"ctc.ctc_lo.bias": state["ctc.ctc_lo.bias"] + torch.linspace(0, 1, 60)}, folder / "final.pt")
    with pytest.raises(ParityError):
        validate_bundle(small_bundle.path, folder)
    with pytest.raises(BundleError, match=r"model\.streaming is True, but the checkpoint has False"):
        validate_bundle(small_bundle.path, golden_checkpoint("not_causal"))


def test_export_and_inspection_say_what_the_checkpoint_holds(moe_export, moe_checkpoint):
    bundle, _, said = moe_export
    content = inspect_bundle(bundle.path)
    mixtures = [module for module in moe_checkpoint.network().modules() if isinstance(module, MixtureOfExperts)]
    assert len(mixtures) == 9
    for group, parts in (("experts", "experts"), ("routers", "gate")):
        weights = [weight for mixture in mixtures for weight in getattr(mixture, parts).parameters()]
        assert content["parameters"][group] == sum(weight.numel() for weight in weights), group
    assert [len(graph["moe_layers"]) for graph in content["graphs"]] == [6, 0, 3]
    metadata = content["graphs"][0]["metadata"]
    assert metadata == bundle_manifest(moe_checkpoint).metadata()
    assert metadata["u2moe.subsampling_rate"] == "4"
    assert said[0].startswith("reading ")
    assert "[2/4] writing encoder.onnx" in said
    assert bundle.manifest.producer.startswith("u2moe ")


def test_commands_and_large_weights_beside_the_graph(small_bundle, golden_checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("u2moe.runtime.graph.file.EXTERNAL_DATA_LIMIT", 30_000)
    out, checkpoint = str(tmp_path / "bundle"), shutil.copytree(golden_checkpoint("small"), tmp_path / "exp")
    (checkpoint / "final.pt").rename(checkpoint / "avg_30.pt")
    (checkpoint / "units.txt").rename(tmp_path / "dict.txt")
    named = [str(checkpoint), "--weights", "avg_30.pt", "--units", str(tmp_path / "dict.txt")]
    for command, message in (
        (["export", *named, out], "torch and onnxruntime agree in"),
        (["validate", out, "--checkpoint", *named], "match their sha256"),
        (["inspect", out], "feed_forward"),
    ):
        assert main(command) == 0
        assert message in capsys.readouterr().out
    assert main(["validate", out, "--weights", "avg_30.pt"]) == 1
    assert "--weights, --units and --lora need --checkpoint" in capsys.readouterr().err
    bundle, graphs = Bundle.open(out), ("encoder.onnx", "decoder.onnx", "features.onnx")
    assert set(bundle.manifest.files) == {*small_bundle.manifest.files, *(f"{graph}.data" for graph in graphs)}
    features = np.random.default_rng(2).normal(8, 2, (100, 80)).astype(np.float32)
    np.testing.assert_array_equal(bundle.load().encode(features), small_bundle.load().encode(features))


def test_where_all_frames_are_blank_the_decoders_see_all(export_quickly, tmp_path):
    folder, scores = write_configuration("non_blank_memory", tmp_path / "checkpoint"), []
    state, config = torch.load(folder / "final.pt", weights_only=True), (folder / "train.yaml").read_text("utf-8")
    state["ctc.ctc_lo.bias"][0] = 1000.0
    torch.save(state, folder / "final.pt")
    features = np.random.default_rng(3).standard_normal((90, 80)).astype(np.float32) * 3 + 11
    for flag in ("false", "true"):
        config = re.sub("(apply_non_blank_embedding): .*", rf"\1: {flag}", config)
        (folder / "train.yaml").write_text(config, encoding="utf-8")
        model = Bundle.open(export_quickly(folder, tmp_path / flag)).load()
        scores.append(np.array(model.rescore(model.encode(features), [[5, 9, 3]])))
    np.testing.assert_array_equal(*scores)
