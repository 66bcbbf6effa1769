"""Features of only some kinds of encoder: caches, streams, quantization and damaged weights."""

import functools
import re

import numpy as np
import onnx_ir as ir
import pytest
import soundfile
import torch
from wenet_directories import write_configuration

from u2moe.export import parity
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.parity import Parity
from u2moe.export.random_checkpoint import random_config
from u2moe.export.sherpa import OFFLINE, SherpaOptions, export_sherpa, supported_graphs
from u2moe.export.training_config import parse_training_config
from u2moe.quantize import RECIPES, quantize_bundle
from u2moe.quantize.inspection import describe, inspect_bundle
from u2moe.runtime import Bundle, CheckpointError, ParityError, ProviderError, StreamError, UnsupportedError

pytestmark = pytest.mark.slow

STREAMING = [
    "e_branchformer", "e_branchformer_moe", "branchformer", "squeezeformer", "efficient_conformer_stream",
    "efficient_conformer_stream_three_rates",
]  # fmt: skip
FULL_CONTEXT = [
    "e_branchformer_not_causal", "branchformer_learned", "squeezeformer_full", "squeezeformer_pre_norm",
    "efficient_conformer",
]  # fmt: skip
BLOCK = "encoder.encoders.1."
CHANGED = [
    ("e_branchformer_moe", f"{BLOCK}cgmlp.channel_proj1.gate.weight"),
    ("e_branchformer_moe", f"{BLOCK}cgmlp.csgu.conv.weight"),
    ("e_branchformer_moe", f"{BLOCK}cgmlp.csgu.linear.weight"),
    ("e_branchformer_moe", f"{BLOCK}depthwise_conv_fusion.weight"),
    ("e_branchformer_moe", f"{BLOCK}feed_forward.experts.3.w_1.weight"),
    ("e_branchformer_moe", "encoder.initial_gates"),
    ("branchformer_learned", f"{BLOCK}pooling_proj2.weight"),
    ("efficient_conformer", f"{BLOCK}self_attn.position_bias"),
    ("efficient_conformer", f"{BLOCK}self_attn.pos_bias_u"),
    ("efficient_conformer", f"{BLOCK}conv_module.depthwise_conv.weight"),
    ("efficient_conformer_stream", "encoder.initial_cache"),
    ("efficient_conformer_stream", f"{BLOCK}self_attn.linear_kv.bias"),
    ("learned_positions", "encoder.embed.pos_enc.pe"),
    ("learned_positions", "decoder.right_decoder.embed.1.pe"),
    ("squeezeformer", "encoder.embed.dw_conv.weight"),
    ("squeezeformer", "encoder.time_reduction_layer.pw_conv.weight"),
    ("squeezeformer", "encoder.time_recover_layer.weight"),
    ("squeezeformer", f"{BLOCK}self_attn.linear_kv.bias"),
    ("squeezeformer", f"{BLOCK}conv_module.pointwise_conv1.gate.bias"),
    ("squeezeformer_full", "encoder.time_reduction_layer.dw_conv.weight"),
    ("squeezeformer_full", f"{BLOCK}self_attn.pos_bias_v"),
    *(
        pytest.param(*case, marks=pytest.mark.endurance)
        for case in (
            ("e_branchformer_moe", f"{BLOCK}cgmlp.csgu.norm.bias"),
            ("e_branchformer_moe", f"{BLOCK}cgmlp.channel_proj2.bias"),
            ("e_branchformer_moe", f"{BLOCK}merge_proj.weight"),
            ("e_branchformer_moe", f"{BLOCK}attn.linear_kv.weight"),
            ("branchformer", f"{BLOCK}merge_proj.bias"),
            ("branchformer_learned", f"{BLOCK}weight_proj1.weight"),
            ("efficient_conformer", f"{BLOCK}self_attn.linear_kv.weight"),
            ("efficient_conformer", f"{BLOCK}self_attn.linear_pos.weight"),
            ("efficient_conformer", f"{BLOCK}conv_module.norm.weight"),
            ("efficient_conformer_stream", "encoder.encoders.2.self_attn.linear_kv.bias"),
            ("squeezeformer", "encoder.preln.bias"),
            ("squeezeformer", f"{BLOCK}ffn2.w_1.bias"),
            ("squeezeformer_full", f"{BLOCK}self_attn.linear_pos.weight"),
            ("squeezeformer_full", f"{BLOCK}self_attn.linear_q.weight"),
        )
    ),
]


@pytest.fixture(autouse=True)
def fewer_streams(monkeypatch):
    monkeypatch.setattr(parity, "CHUNKS", ((8, 2), (4, 1)))


@pytest.fixture(scope="module")
def exported(export_quickly, tmp_path_factory):
    """A function from a configuration to its checkpoint and its bundle, which test_export compares with torch."""

    @functools.cache
    def export(name):
        folder = tmp_path_factory.mktemp(name)
        checkpoint = Checkpoint.open(write_configuration(name, folder / "checkpoint"))
        return checkpoint, Bundle.open(export_quickly(checkpoint.path, folder / "bundle"))

    return export


def features(num_frames, seed=0):
    return np.random.default_rng(seed).normal(10, 3, (num_frames, 80)).astype(np.float32)


@pytest.mark.parametrize(("name", "weight"), CHANGED)
def test_a_changed_weight_is_found(exported, tmp_path, name, weight):
    """As in test_export, one value moves by a third of the largest value."""
    checkpoint, bundle = exported(name)
    for file in bundle.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = f"{weight.split('.')[0]}.onnx"
    model = ir.load(tmp_path / graph)
    value = model.graph.initializers[weight]
    array = value.const_value.numpy().copy()
    # the last learned position that an utterance can reach
    array.flat[-1 if weight.endswith(".pe") else array.size // 2] += np.abs(array).max() / 3 + 1e-2
    value.const_value = ir.tensor(array, name=weight)
    ir.save(model, tmp_path / graph)
    with pytest.raises(ParityError, match="largest difference"):
        Parity(checkpoint.network(), tmp_path, bundle.manifest, subject=tmp_path).run()


def test_layers_have_native_kernels_or_a_reason_and_no_more_positions_than_were_learned(exported):
    """A stream with limited left context is moved back before it exceeds them."""
    _, bundle = exported("learned_positions")
    model, most = bundle.load(), bundle.manifest.model.num_features(448)
    assert len(model.encode(features(most))) == 448
    for chunks in ((), (16, -1)):
        with pytest.raises(ProviderError, match="REFUSED: there are 448 learned positions"):
            model.encode(features(most + 4), *chunks)
    assert len(model.encode(features(most + 4), 16, 4)) == 449
    content = inspect_bundle(exported("squeezeformer_full")[1].path)
    content["kernels"] |= {"operators": ["Normalization"], "description": "none but one"}
    lines = describe(content).splitlines()
    (native,) = (line for line in lines if line.startswith("  native"))
    assert re.fullmatch(r"  native       \d+ x Normalization", native)
    assert any(re.match("  onnxruntime  4 x ShiftedAttention, . x Attention: over whole sequences", x) for x in lines)


DAMAGED = {
    "e_branchformer": f"{BLOCK}depthwise_conv_fusion.weight",
    "branchformer_learned": f"{BLOCK}pooling_proj1.weight",
    "squeezeformer_full": "encoder.time_reduction_layer.dw_conv.weight",
    "efficient_conformer_causal": "encoder.encoders.2.self_attn.pos_bias_v",
    "learned_positions": "decoder.left_decoder.embed.1.pe",
    "shaw": f"{BLOCK}self_attn.rel_k_embed.weight",
    "stack_n_frames": "encoder.embed.norm.weight",
    "linear": "encoder.embed.out.1.bias",
    "conv1d2": "encoder.embed.conv.0.weight",
}


@pytest.mark.parametrize(("name", "weight"), DAMAGED.items())
def test_damaged_checkpoints_are_named(tmp_path, name, weight):
    folder = write_configuration(name, tmp_path / "checkpoint")
    state, units = torch.load(folder / "final.pt", weights_only=True), (folder / "units.txt").read_text()

    def refused(changed, message, averaged):
        torch.save(changed, averaged)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(folder, averaged)

    # like WeNet's average_model.py, which makes counters fractional
    good = {key: torch.true_divide(value, 1) for key, value in state.items()}
    for where in (folder / "avg_5.pt", tmp_path / "elsewhere.pt"):
        others = {key: value for key, value in good.items() if key != weight}
        refused(others, rf"{where.name}: .* 1 tensors missing \({weight}\)", where)
        refused({**good, weight: torch.ones(3)}, rf"{where.name}: {weight} has shape \(3,\), but train.yaml ", where)
        extra = {**good, f"{weight}.more": torch.ones(3)}
        refused(extra, rf"0 tensors missing; 1 tensors not used by the network \({weight}.more\)", where)
        torch.save(good, where)
        found = Checkpoint.open(folder, where.name if where.parent == folder else where).tensors
        assert torch.equal(found[weight], state[weight])
    (folder / "units.txt").write_text(units.rpartition("\n")[0].rpartition("\n")[0] + "\n")
    refused(good, "units.txt: has 59 symbols, expected 60, the output_dim in train.yaml", where)


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize(("chunk_size", "left"), [(4, 1), (8, 0), (6, -1)])
def test_a_stream_is_the_whole_utterance_under_a_mask_of_chunks(exported, name, chunk_size, left):
    checkpoint, bundle = exported(name)
    chunk_size = bundle.manifest.model.whole_chunk(chunk_size)
    frames = features(203)
    with torch.inference_mode():
        masked, _ = checkpoint.network().encoder(torch.from_numpy(frames[None]), torch.tensor([203]), chunk_size, left)
    np.testing.assert_allclose(bundle.load().encode(frames, chunk_size, left), masked[0].numpy(), atol=1e-4)


def test_two_rates_of_frames_take_two_frames_at_a_time(exported, tmp_path):
    _, bundle = exported("squeezeformer")
    caches = {cache.name: (cache.num_blocks, cache.shape, cache.rate) for cache in bundle.manifest.model.caches}
    assert caches == {
        "att_cache": (2, (4, 0, 16), 1.0), "half_att_cache": (2, (4, 0, 16), 0.5), "cnn_cache": (4, (32, 6), 1.0),
    }  # fmt: skip
    assert bundle.manifest.model.stream_chunk_size == 16
    with pytest.raises(StreamError, match="chunk_size must be a multiple of 2 for this encoder, got 5"):
        bundle.load().encode(features(100), chunk_size=5)
    assert export_sherpa(bundle.path, tmp_path / "sherpa").graphs == (OFFLINE,)


@pytest.mark.parametrize("name", FULL_CONTEXT)
def test_what_needs_the_whole_utterance_refuses_chunks(exported, name):
    _, bundle = exported(name)
    model = bundle.load()
    assert model.encode(features(100)).shape == (96 // model.config.subsampling_rate, 32)
    with pytest.raises(StreamError, match="cannot stream"):
        model.encode(features(100), chunk_size=16)


@pytest.mark.parametrize(("name", "reason"), [
    ("e_branchformer", "the encoder keeps merge_cache, which"),
    ("branchformer", "24 channels .*half of cgmlp_linear_units. do not match output_size 32, which"),
    ("squeezeformer", "the encoder keeps half_att_cache, which"),
    ("efficient_conformer_stream", "the encoder keeps att_cache_2, cnn_cache_2, which"),
    ("efficient_conformer", "looks ahead or was not trained on chunks, so .* then use the offline client"),
])  # fmt: skip
def test_encoders_that_the_online_client_of_sherpa_onnx_cannot_hold(exported, name, reason):
    """Each refusal names an alternative."""
    _, bundle = exported(name)
    said = []
    graphs = supported_graphs(bundle.path, bundle.manifest, bundle.tokens, SherpaOptions(), said.append)
    assert graphs == (OFFLINE,)
    instead = "" if "looks ahead" in reason else ".*: use u2moe convert --profile streaming"
    assert re.search(f"no model-streaming.onnx: .*{reason}{instead}", said[0])


@pytest.mark.parametrize(("name", "recipe"), [
    ("e_branchformer_moe", "int8"),
    ("e_branchformer_moe", "int4-experts"),
    ("branchformer", "int8"),
    ("squeezeformer", "int8"),
    ("efficient_conformer_stream", "int8"),
    ("efficient_conformer_experts_in_the_decoder", "int4-experts"),
    ("branchformer", "int4"),
    *(
        pytest.param(*case, marks=pytest.mark.endurance)
        for case in (
            ("squeezeformer_full", "int8"),
            ("squeezeformer_experts_in_the_decoder", "int4-experts"),
            ("branchformer_experts_in_the_decoder", "int4-experts"),
            ("squeezeformer", "int4"),
            ("efficient_conformer_stream", "int4"),
        )
    ),
])  # fmt: skip
def test_quantization_reads_layers_and_no_names_of_encoders(exported, sound, tmp_path, name, recipe):
    """All large weights are quantized, and outputs stay close to float32; a report of each encoder shows it."""
    _, bundle = exported(name)
    soundfile.write(tmp_path / "sound.wav", sound[:16_000], 16_000)
    path, audio = tmp_path / "quantized", [tmp_path / "sound.wav"] * (recipe == "int8")
    quantized, report = quantize_bundle(bundle.path, path, RECIPES[recipe], audio=audio)
    assert quantized.manifest.quantization["num_weights"]["feed_forward"] >= 4
    frames, config = features(203), bundle.manifest.model
    if audio:
        shown = ["full context", *([f"chunk {config.stream_chunk_size}, left 4"] if config.streaming else [])]
        assert list(report["speed"]["encoder"]) == shown
        assert max(each["relative"] for each in report["weight_error"].values()) < 0.2
    for chunk in (None, config.whole_chunk(8)) if config.streaming else (None,):
        found, expected = (each.load().encode(frames, chunk) for each in (quantized, bundle))
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(("encoder", "conf", "error", "message"), [
    ("e_branchformer", {"cgmlp_linear_units": 7}, CheckpointError, "cgmlp_linear_units must be even"),
    ("e_branchformer", {"causal": False, "merge_conv_kernel": 4}, CheckpointError, "merge_conv_kernel must be odd"),
    ("e_branchformer", {"gate_activation": "sine"}, UnsupportedError, "gate_activation is 'sine'"),
    ("e_branchformer", {"cnn_module_kernel": 7}, UnsupportedError, "unknown keys cnn_module_kernel"),
    ("branchformer", {"use_attn": False}, UnsupportedError, "use_attn is False, which is not supported"),
    ("branchformer", {"mlp_type": "moe"}, UnsupportedError, "unknown keys mlp_type"),
    ("branchformer", {"cgmlp_weight": [0.5]}, CheckpointError, "a number, or one for each of 2 blocks"),
    ("branchformer", {"merge_method": "fixed_ave", "cgmlp_weight": 1}, UnsupportedError, "above 0 and below 1"),
    ("branchformer", {"merge_method": "sum"}, UnsupportedError, "merge_method is 'sum'"),
    ("efficientConformer", {"mlp_type": "moe"}, UnsupportedError, "mlp_type is 'moe', which is not supported"),
    ("efficientConformer", {"efficient_conf": {"stride": [2, 2]}}, CheckpointError, "must be one number for each"),
    ("efficientConformer", {"efficient_conf": {"groups": 2}}, UnsupportedError, "unknown keys groups"),
    ("efficientConformer", {"cnn_module_kernel": 9}, CheckpointError, "that gives block 2 an odd kernel instead of 4"),
    ("efficientConformer", {"causal": True, "use_dynamic_chunk": False, "static_chunk_size": 4}, UnsupportedError,
     "static_chunk_size is 4, which is not supported; supported: multiples of 6"),
    ("squeezeformer", {"reduce_idx": None}, UnsupportedError, "reduce_idx is None, which is not supported"),
    ("squeezeformer", {"recover_idx": 1}, CheckpointError, "recover_idx must be above reduce_idx 1, got 1"),
    ("squeezeformer", {"recover_idx": 4}, CheckpointError, "recover_idx must be the index of a block from 1 to 3"),
    ("squeezeformer", {"encoder_dim": 64}, UnsupportedError, "output_size is 32, which is not supported"),
    ("squeezeformer", {"time_reduction_layer_type": "conv2d"}, UnsupportedError, "supported: conv1d, stream"),
    ("squeezeformer", {"mlp_type": "moe"}, UnsupportedError, "unknown keys mlp_type"),
])  # fmt: skip
def test_settings_that_are_refused(encoder, conf, error, message):
    with pytest.raises(error, match=message):
        parse_training_config(random_config(encoder=encoder, encoder_conf=conf))
