"""Exported graphs against torch: accepted configurations, experts, distant positions, and faults that must be found."""

import dataclasses
import re
from pathlib import Path

import golden_recordings
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from wenet_directories import CONFIGURATIONS, PAIRS, configured, write_configuration

from u2moe.export import comparison, exporter, parity
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.comparison import LIMIT, LOG_PROBABILITIES
from u2moe.export.exporter import build_graphs, bundle_manifest, export_bundle, validate_bundle
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.parity import Parity, moe_session
from u2moe.export.proofs import settings
from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.export.training_config import parse_training_config
from u2moe.quantize import inspect_bundle
from u2moe.runtime import Bundle, BundleError, CheckpointError, ParityError
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.cli import main
from u2moe.runtime.graph.dispatch import mixture_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fewer_streams(monkeypatch):
    """Use two chunk sizes, which are enough here; `moe_bundle` compares all."""
    monkeypatch.setattr(parity, "CHUNKS", ((8, 2), (4, -1)))


@pytest.fixture(scope="module")
def moe_checkpoint(golden_checkpoint):
    return Checkpoint.open(golden_checkpoint("moe_tiny"))


@pytest.fixture(scope="module")
def said():
    """Progress messages of the export of `moe_bundle`."""
    return []


@pytest.fixture(scope="module")
def moe_bundle(golden_checkpoint, tmp_path_factory, said):
    out = tmp_path_factory.mktemp("export") / "bundle"
    return export_bundle(golden_checkpoint("moe_tiny"), out, progress=said.append)


COMBINED = {
    "moe_top_3", "one_decoder_tied", "static_and_dynamic_chunk", "sos_eos_last", "sos_unlike_eos", "bpe", "sdpa",
    "non_blank_memory_one_decoder", "shaw_linear", "kernel_31", "convolution_factor_3", "transformer_moe", "post_norm",
    "moe_gqa_rms_norm", "relu", "linear",
}  # fmt: skip
"""Networks with settings that no other has, or with one of EACH_SETTING."""
EACH_SETTING = {f"pair_{number}" for number in (1, 3, 4, 5, 9, 12, 15, 17, 28, 38, 42, 52, 56, 73)}
"""Pairs that together contain each setting once."""


def configurations():
    """Return all of them; `make test` compares each setting once, and test_configurations all of them with WeNet. Those
    of test_golden_recordings are compared there: graphs with WeNet, on recordings and their chunks."""
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


def test_mixture_of_experts_is_one_node_and_one_function_that_reaches_all_experts(moe_bundle):
    model = ir.load(moe_bundle[0].path / "encoder.onnx")
    calls = [node for node in model.graph if mixture_of(node)]
    assert len(calls) == 6
    assert {node.op_type for node in calls} == {"MixtureOfExperts"}
    assert {mixture_of(node) for node in calls} == {Mixture(num_experts=8, top_k=2, activation="swish")}
    assert [function.name for function in model.functions.values() if "Mixture" in function.name] == [
        "MixtureOfExperts"
    ]
    assert model.opset_imports[""] == 18
    assert model.ir_version == 8
    assert {node.domain for function in model.functions.values() for node in function} == {""}
    _, report = moe_bundle
    assert len(report.tokens_per_expert) == 9
    for layer, counts in report.tokens_per_expert.items():
        assert min(counts) > 0, layer


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 65])
def test_mixture_of_experts_of_any_number_of_tokens(moe_bundle, moe_checkpoint, num_tokens):
    session = moe_session(ir.load(moe_bundle[0].path / "encoder.onnx"), "encoder.encoders.1.feed_forward")
    tokens = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(num_tokens))
    block = moe_checkpoint.network().encoder.encoders[1]
    with torch.inference_mode():
        expected = block.scale * block.feed_forward(tokens).numpy()  # as one half of the two macaron layers
    assert block.scale == 0.5
    np.testing.assert_allclose(session.run(None, {"x": tokens.numpy()})[0], expected, atol=2e-6)


@pytest.mark.parametrize("offset", [4990, 200_000, 3_000_000])
def test_positions_have_no_end(moe_bundle, moe_checkpoint, offset):
    """WeNet's table ends at 5000 frames, 200 seconds; ours is computed. 3 million frames are 33 hours."""
    encoder = moe_bundle[0].load().encoder
    chunk = np.random.default_rng(0).normal(8, 2, (1, 67, 80)).astype(np.float32)
    start = encoder.start()
    caches = dataclasses.replace(
        start, offset=np.array([offset]), tensors=start.tensors | {"cnn_cache": np.full((3, 1, 64, 7), 0.1, np.float32)}
    )
    feeds = {
        "chunk": chunk, "chunk_lens": np.array([67]), "offset": caches.offset, "required_cache_size": np.array(-1),
        **caches.tensors,
    }  # fmt: skip
    output = encoder.session.run(feeds)["output"]
    torch_caches = [{"att_cache": torch.zeros(1, 4, 0, 32), "cnn_cache": torch.full((1, 64, 7), 0.1)} for _ in range(3)]
    with torch.inference_mode():
        expected, _ = moe_checkpoint.network().encoder.forward_chunk(torch.from_numpy(chunk), offset, torch_caches, -1)
    np.testing.assert_allclose(output, expected.numpy(), atol=LIMIT)


def test_large_weights_are_saved_beside_the_graph(golden_checkpoint, monkeypatch, tmp_path, moe_bundle):
    monkeypatch.setattr("u2moe.runtime.graph.file.EXTERNAL_DATA_LIMIT", 100_000)
    bundle, _ = export_bundle(golden_checkpoint("moe_tiny"), tmp_path / "bundle")
    assert set(bundle.manifest.files) == {
        "tokens.txt", "encoder.onnx", "encoder.onnx.data", "ctc.onnx", "decoder.onnx", "decoder.onnx.data",
        "features.onnx", "features.onnx.data",
    }  # fmt: skip
    features = np.random.default_rng(2).normal(8, 2, (100, 80)).astype(np.float32)
    np.testing.assert_array_equal(bundle.load().encode(features), moe_bundle[0].load().encode(features))


WEIGHTS = [
    ("encoder", "encoder.global_cmvn.mean"),
    ("encoder", "encoder.embed.conv.2.weight"),
    ("encoder", "encoder.encoders.0.feed_forward_macaron.gate.weight"),
    ("encoder", "encoder.encoders.2.feed_forward.experts.7.w_1.weight"),
    ("encoder", "encoder.encoders.0.self_attn.linear_q.weight"),
    ("encoder", "encoder.position_biases.weight"),
    ("encoder", "encoder.encoders.0.self_attn.linear_pos.weight"),
    ("encoder", "encoder.encoders.2.conv_module.depthwise_conv.weight"),
    ("encoder", "encoder.encoders.2.conv_module.pointwise_conv1.gate.weight"),
    ("encoder", "encoder.initial_cache"),
    ("encoder", "encoder.encoders.1.norm_final.bias"),
    ("ctc", "ctc.ctc_lo.bias"),
    ("decoder", "decoder.left_decoder.embed.0.weight"),
    ("decoder", "decoder.left_decoder.decoders.1.feed_forward.experts.5.w_2.bias"),
    ("decoder", "decoder.right_decoder.decoders.0.src_attn.linear_kv.weight"),
    *(
        pytest.param(graph, weight, marks=pytest.mark.endurance)
        for graph, weight in (
            ("encoder", "encoder.embed.out.0.bias"),
            ("encoder", "encoder.encoders.1.feed_forward.experts.3.w_1.bias"),
            ("encoder", "encoder.encoders.1.feed_forward.experts.0.w_2.weight"),
            ("encoder", "encoder.encoders.0.self_attn.linear_q.bias"),
            ("encoder", "encoder.encoders.2.self_attn.linear_kv.weight"),
            ("decoder", "decoder.right_decoder.output_layer.weight"),
        )
    ),
]


@pytest.mark.parametrize(("graph", "weight"), WEIGHTS)
def test_a_changed_weight_is_found(graph, weight, moe_bundle, moe_checkpoint, tmp_path):
    """Parity must fail for each kind of weight: one value moves by a third of the tensor's largest value."""
    bundle, _ = moe_bundle
    for file in bundle.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = ir.load(tmp_path / f"{graph}.onnx")
    value = model.graph.initializers[weight]
    array = value.const_value.numpy().copy()
    array.flat[array.size // 2] += np.abs(array).max() / 3
    value.const_value = ir.tensor(array, name=weight)
    ir.save(model, tmp_path / f"{graph}.onnx")
    with pytest.raises(ParityError, match="largest difference"):
        Parity(moe_checkpoint.network(), tmp_path, bundle.manifest, subject=tmp_path).run()


def test_routers_that_cannot_choose_are_named_and_each_setting_is_compared(moe_bundle, moe_checkpoint):
    bundle, _ = moe_bundle
    network = moe_checkpoint.network()
    gate = network.get_submodule("encoder.encoders.0.feed_forward.gate")
    gate.weight = torch.nn.Parameter(torch.zeros_like(gate.weight), requires_grad=False)
    with pytest.raises(ParityError, match="a router has near ties between experts for all 8 inputs"):
        Parity(network, bundle.path, bundle.manifest, subject=bundle.path).run()

    def settings_of(names):
        found = (parse_training_config(configured(PAIRS[name])[0]).architecture for name in names)
        return {(part, *setting) for network in found for part, own in settings(network).items() for setting in own}

    assert settings_of(EACH_SETTING) == settings_of(PAIRS)
    _, report = moe_bundle
    assert {item.limit for item in report.comparisons if item.tensor in LOG_PROBABILITIES} == {LIMIT}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Tied embeddings as initialised by torch: the decoders are certain that the last token is repeated."""
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    encoder_conf = {"output_size": 256, "num_blocks": 1, "linear_units": 64}
    decoder_conf = {"tie_word_embedding": True, "num_blocks": 1, "linear_units": 64}
    write_random_checkpoint(folder, random_config(encoder_conf=encoder_conf, decoder_conf=decoder_conf))
    state = torch.load(folder / "final.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for side in ("left", "right"):
        state[f"decoder.{side}_decoder.embed.0.weight"] = torch.randn(60, 256, generator=generator)
    torch.save(state, folder / "final.pt")
    return folder


def test_parity_is_relative_to_large_log_probabilities(untrained, tmp_path):
    bundle, report = export_bundle(untrained, tmp_path / "bundle")
    limits = {item.tensor: item.limit for item in report.comparisons}
    assert limits["log_probs"] == LIMIT
    assert 2e-4 < limits["score"] < 4e-4
    network = Checkpoint.open(untrained).network()

    def parity_after(shift):
        """Compare a graph with a larger bias for the end of the sentence, which every score includes once."""
        model = ir.load(bundle.path / "decoder.onnx")
        weight = model.graph.initializers["decoder.left_decoder.output_layer.bias"]
        bias = weight.const_value.numpy() + shift * np.eye(1, 60, bundle.manifest.model.eos, dtype=np.float32)[0]
        weight.const_value = ir.tensor(bias, name=weight.name)
        ir.save(model, bundle.path / "decoder.onnx")
        return Parity(network, bundle.path, bundle.manifest, subject=untrained).run()

    differences = {item.tensor: item.difference for item in parity_after(1.3e-4).comparisons}
    assert LIMIT < differences["score"] < limits["score"]
    with pytest.raises(ParityError, match=r"decoder, two utterances: .*: largest difference .*, limit 0.000[23]"):
        parity_after(1e-3)


def test_rounding_is_told_from_a_difference(golden_checkpoint, export_quickly, monkeypatch, tmp_path):
    """With a limit below single precision, each tensor is compared with torch in float64."""
    checkpoint = Checkpoint.open(golden_checkpoint("dense_tiny"))
    folder, said = export_quickly(checkpoint.path, tmp_path / "bundle"), []
    for module, name, value in ((comparison, "LIMIT", 1e-9), (parity, "ROUNDING", 50), (parity, "MOST_ROUNDING", 1e6)):
        monkeypatch.setattr(module, name, value)
    manifest = Bundle.open(folder).manifest
    report = Parity(checkpoint.network(), folder, manifest, subject=folder).run(said.append)
    exact = [item for item in report.comparisons if item.rounding is not None]
    assert {"output", "log_probs", "r_att_cache", "score"} <= {item.tensor for item in exact}
    assert all(item.limit == 50 * item.rounding < 10 * LIMIT for item in exact)
    assert any(
        re.fullmatch(r"log_probs: equal within rounding: .* in float64 .*, limit .*; torch in .*", line)
        for line in said
    )
    model = ir.load(folder / "ctc.onnx")
    bias = model.graph.initializers["ctc.ctc_lo.bias"]
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.eye(1, 60, 5, dtype=np.float32)[0] / 100, name=bias.name)
    ir.save(model, folder / "ctc.onnx")
    with pytest.raises(
        ParityError, match=r"log_probs: largest difference 0\.0\d+ between torch in float64 and onnxrunt"
    ):
        Parity(checkpoint.network(), folder, manifest, subject=folder).run()


def test_a_failed_export_leaves_nothing(golden_checkpoint, monkeypatch, tmp_path):
    def shifted(network, manifest):
        for model in build_graphs(network, manifest):
            if model.graph.name == "ctc":
                bias = network.ctc.ctc_lo.bias.detach().numpy() + np.eye(1, 60, 5, dtype=np.float32)[0]
                model.graph.initializers["ctc.ctc_lo.bias"].const_value = ir.tensor(bias, name="ctc.ctc_lo.bias")
            yield model

    monkeypatch.setattr(exporter, "build_graphs", shifted)
    with pytest.raises(ParityError, match="log_probs") as error:
        export_bundle(golden_checkpoint("moe_tiny"), tmp_path / "new" / "folders" / "bundle")
    # the compared folder no longer exists
    assert str(error.value).startswith(f"{golden_checkpoint('moe_tiny') / 'final.pt'}: full context")
    assert str(tmp_path) not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_validate_compares_with_the_right_checkpoint(golden_checkpoint, moe_bundle, tmp_path):
    bundle, _ = moe_bundle
    assert validate_bundle(bundle.path, golden_checkpoint("moe_tiny")).comparisons
    other = write_like_moe_tiny(golden_checkpoint("moe_tiny"), tmp_path / "other")
    with pytest.raises(ParityError):
        validate_bundle(bundle.path, other)
    with pytest.raises(BundleError, match=r"model\.streaming is True, but the checkpoint has False"):
        validate_bundle(bundle.path, write_configuration("not_causal", tmp_path / "offline"))


def write_like_moe_tiny(checkpoint, folder):
    """Write moe_tiny with other weights."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name in ("train.yaml", "units.txt", "global_cmvn"):
            (folder / file.name).write_bytes(file.read_bytes())
    state = torch.load(checkpoint / "final.pt", weights_only=True)
    state["ctc.ctc_lo.bias"] = state["ctc.ctc_lo.bias"] + torch.linspace(0, 1, 60)
    torch.save(state, folder / "final.pt")
    return folder


def test_export_and_inspection_say_what_the_checkpoint_holds(moe_bundle, moe_checkpoint, said):
    content = inspect_bundle(moe_bundle[0].path)
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
    assert moe_bundle[0].manifest.producer.startswith("u2moe ")


def test_commands(golden_checkpoint, tmp_path, capsys):
    out = str(tmp_path / "bundle")
    assert main(["export", str(golden_checkpoint("dense_tiny")), out]) == 0
    assert "torch and onnxruntime agree in" in capsys.readouterr().out
    assert main(["validate", out, "--checkpoint", str(golden_checkpoint("dense_tiny"))]) == 0
    assert "match their sha256" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert "feed_forward" in capsys.readouterr().out
    assert main(["export", str(golden_checkpoint("dense_tiny")), out]) == 1
    assert "not empty" in capsys.readouterr().err
    Path(out, "ctc.onnx").write_bytes(b"")
    assert main(["validate", out]) == 1
    assert "ctc.onnx" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "function"), [
    (["export", "exp", "out"], "exporter.export_bundle"),
    (["validate", "BUNDLE", "--checkpoint", "exp"], "exporter.validate_bundle"),
])  # fmt: skip
def test_commands_name_files(command, function, moe_bundle, monkeypatch, capsys):
    given = {}

    def stop(*_, **arguments):
        given.update(arguments)
        raise CheckpointError("stopped")

    monkeypatch.setattr(f"u2moe.export.{function}", stop)
    bundle = str(moe_bundle[0].path)
    command = [bundle if word == "BUNDLE" else word for word in command]
    assert main([*command, "--weights", "avg_30.pt", "--units", "dict/units.txt"]) == 1
    assert capsys.readouterr().err == "u2moe: error: stopped\n"
    assert (given["weights"], given["units"]) == ("avg_30.pt", "dict/units.txt")


def test_where_all_frames_are_blank_the_decoders_see_all(export_quickly, tmp_path):
    folder = write_configuration("non_blank_memory", tmp_path / "checkpoint")
    features = np.random.default_rng(3).standard_normal((90, 80)).astype(np.float32) * 3 + 11

    def score(bias, flag, name):
        state = torch.load(folder / "final.pt", weights_only=True)
        state["ctc.ctc_lo.bias"][0] = bias
        torch.save(state, folder / "final.pt")
        text = (folder / "train.yaml").read_text(encoding="utf-8")
        text = re.sub("(apply_non_blank_embedding): .*", rf"\1: {flag}", text)
        (folder / "train.yaml").write_text(text, encoding="utf-8")
        model = Bundle.open(export_quickly(folder, tmp_path / name)).load()
        return np.array(model.rescore(model.encode(features), [[5, 9, 3]]))

    everything = score(1000.0, "false", "all")
    assert np.array_equal(score(1000.0, "true", "blank"), everything)
    assert np.abs(score(6.0, "true", "some") - everything).min() > 0.1
