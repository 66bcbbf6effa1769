"""Features of only some kinds of encoder, front end or positions: caches, streams, quantization and damaged weights."""

import functools
import re

import numpy as np
import onnx_ir as ir
import pytest
import soundfile
import torch

from u2moe.export import parity
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.comparison import LIMIT
from u2moe.export.exporter import bundle_manifest
from u2moe.export.parity import Parity
from u2moe.export.random_checkpoint import random_config
from u2moe.export.sherpa import OFFLINE, SherpaOptions, supported_graphs
from u2moe.export.training_config import parse_training_config
from u2moe.quantize import RECIPES, quantize_bundle
from u2moe.quantize.inspection import describe, inspect_bundle
from u2moe.runtime import Bundle, SessionSettings
from u2moe.runtime.errors import CheckpointError, ParityError, ProviderError, StreamError, UnsupportedError
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_networks")]

FRONT_ENDS = ("shaw_linear", "stack_n_frames", "conv2d2", "conv1d2")
"""Networks with weights in subsampling or positions that those of `CHANGED` lack."""
BLOCK = "encoder.encoders.1."
CHANGED = {
    "small": """
        encoder.global_cmvn.mean feed_forward.experts.3.w_1.weight encoder.position_biases.weight encoder.initial_cache
        encoder.encoders.0.self_attn.linear_pos.weight conv_module.depthwise_conv.weight ctc.ctc_lo.bias
        decoder.left_decoder.embed.0.weight decoder.right_decoder.decoders.0.src_attn.linear_kv.weight |
        encoder.embed.conv.2.weight encoder.encoders.0.feed_forward_macaron.gate.weight encoder.embed.out.0.bias
        encoder.encoders.0.self_attn.linear_q.weight conv_module.pointwise_conv1.gate.weight norm_final.bias
        feed_forward.experts.3.w_1.bias feed_forward.experts.0.w_2.weight encoder.encoders.0.self_attn.linear_q.bias
        self_attn.linear_kv.weight decoder.right_decoder.output_layer.weight""",
    "e_branchformer_moe": """
        cgmlp.csgu.conv.weight depthwise_conv_fusion.weight encoder.initial_gates
        decoder.left_decoder.decoders.0.feed_forward.experts.3.w_2.bias | cgmlp.channel_proj1.gate.weight
        cgmlp.csgu.linear.weight feed_forward.experts.3.w_1.weight cgmlp.csgu.norm.bias cgmlp.channel_proj2.bias
        merge_proj.weight attn.linear_kv.weight""",
    "branchformer": "| merge_proj.bias",
    "branchformer_learned": "pooling_proj2.weight | weight_proj1.weight",
    "efficient_conformer": """
        self_attn.position_bias | self_attn.pos_bias_u conv_module.depthwise_conv.weight self_attn.linear_kv.weight
        self_attn.linear_pos.weight conv_module.norm.weight""",
    "efficient_conformer_stream": """
        encoder.initial_cache | self_attn.linear_kv.bias encoder.encoders.2.self_attn.linear_kv.bias""",
    "learned_positions": "encoder.embed.pos_enc.pe decoder.right_decoder.embed.1.pe",
    "squeezeformer": """
        encoder.embed.dw_conv.weight encoder.time_reduction_layer.pw_conv.weight encoder.time_recover_layer.weight |
        self_attn.linear_kv.bias conv_module.pointwise_conv1.gate.bias encoder.preln.bias ffn2.w_1.bias""",
    "squeezeformer_full": """
        encoder.time_reduction_layer.dw_conv.weight self_attn.pos_bias_v | self_attn.linear_pos.weight
        self_attn.linear_q.weight""",
}
"""Weights by network, without the name of the second block; those after a bar only in `make check-all`."""


@pytest.fixture(scope="module")
def opened(golden_checkpoint, exported):
    """A function from a network to its checkpoint, its bundle, which test_export compares with torch, and its model."""

    @functools.cache
    def open_network(name):
        bundle = Bundle.open(exported(name))
        return Checkpoint.open(golden_checkpoint(name)), bundle, bundle.load()

    return open_network


def features(num_frames, seed=0):
    return np.random.default_rng(seed).normal(10, 3, (num_frames, 80)).astype(np.float32)


def change(model, name, place=None):
    """Move one value of a weight by a third of its largest value, and return the original."""
    value = model.graph.initializers[name]
    original, array = value.const_value, value.const_value.numpy().copy()
    array.flat[array.size // 2 if place is None else place] += np.abs(array).max() / 3 + 1e-2
    value.const_value = ir.tensor(array, name=name)
    return original


@pytest.mark.parametrize(("name", "weight"), [
    pytest.param(name, weight, marks=marks) for name, weights in CHANGED.items()
    for part, marks in zip(weights.split("|"), ((), pytest.mark.endurance), strict=False) for weight in part.split()
])  # fmt: skip
def test_a_changed_weight_is_found(opened, tmp_path, monkeypatch, name, weight):
    """Parity must fail for each kind of weight."""
    monkeypatch.setattr(parity, "CHUNKS", ((8, 2),))
    weight = weight if re.match("encoder|ctc|decoder", weight) else BLOCK + weight
    checkpoint, bundle, _ = opened(name)
    for file in bundle.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = f"{weight.split('.')[0]}.onnx"
    model = ir.load(tmp_path / graph)
    change(model, weight, -1 if weight.endswith(".pe") else None)  # the last learned position that can be reached
    ir.save(model, tmp_path / graph)
    with pytest.raises(ParityError, match="largest difference"):
        Parity(checkpoint.network(), tmp_path, bundle.manifest, subject=tmp_path).run()


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_each_weight_of_front_ends_counts(opened, tmp_path, name):
    checkpoint, bundle, model = opened(name)
    frames, config = features(150), bundle.manifest.model
    with torch.inference_mode():
        wanted = checkpoint.network().encoder(torch.from_numpy(frames[None]), torch.tensor([150]))[0][0].numpy()
    graph = ir.load(bundle.path / "encoder.onnx")
    names = [each for each in graph.graph.initializers if each.startswith("encoder.embed.") or "rel_k_embed" in each]
    assert names
    assert np.abs(model.encode(frames) - wanted).max() < LIMIT
    for weight in names:
        original = change(graph, weight)
        ir.save(graph, tmp_path / "encoder.onnx")
        graph.graph.initializers[weight].const_value = original
        session = Session(tmp_path / "encoder.onnx", config.graphs()[0], bundle.manifest, SessionSettings())
        assert np.abs(Encoder(session, config).whole(frames) - wanted).max() > LIMIT, weight


def test_layers_have_native_kernels_or_a_reason_and_no_more_positions_than_were_learned(opened):
    """A stream with limited left context is moved back before it exceeds them."""
    _, bundle, model = opened("learned_positions")
    most = bundle.manifest.model.num_features(448)
    assert len(model.encode(features(most))) == 448
    for chunks in ((), (16, -1)):
        with pytest.raises(ProviderError, match="REFUSED: there are 448 learned positions"):
            model.encode(features(most + 4), *chunks)
    assert len(model.encode(features(most + 4), 16, 4)) == 449
    content = inspect_bundle(opened("squeezeformer_full")[1].path)
    content["kernels"] |= {"operators": ["Normalization"], "description": "none but one"}
    lines = describe(content).splitlines()
    (native,) = (line for line in lines if line.startswith("  native"))
    assert re.fullmatch(r"  native       \d+ x Normalization", native)
    assert any(re.match("  onnxruntime  4 x ShiftedAttention, . x Attention: over whole sequences", x) for x in lines)


@pytest.mark.parametrize("name", [
    "e_branchformer_moe", "branchformer", "squeezeformer", "efficient_conformer_stream_three_rates",
])  # fmt: skip
def test_a_stream_is_the_whole_utterance_under_a_mask_of_chunks(opened, name):
    checkpoint, bundle, model = opened(name)
    frames, network = features(131), checkpoint.network()
    for size, left in ((4, 1), (8, 0), (6, -1)):
        chunk_size = bundle.manifest.model.whole_chunk(size)
        with torch.inference_mode():
            masked, _ = network.encoder(torch.from_numpy(frames[None]), torch.tensor([131]), chunk_size, left)
        np.testing.assert_allclose(model.encode(frames, chunk_size, left), masked[0].numpy(), atol=1e-4)


def test_two_rates_of_frames_take_two_frames_at_a_time(opened):
    _, bundle, model = opened("squeezeformer")
    caches = [(cache.name, cache.num_blocks, cache.shape, cache.rate) for cache in bundle.manifest.model.caches]
    keys = [("att_cache", 2, (4, 0, 16), 1.0), ("half_att_cache", 2, (4, 0, 16), 0.5)]
    assert sorted(caches) == [*keys[:1], ("cnn_cache", 4, (32, 6), 1.0), *keys[1:]]
    assert bundle.manifest.model.stream_chunk_size == 16
    with pytest.raises(StreamError, match="chunk_size must be a multiple of 2 for this encoder, got 5"):
        model.encode(features(100), chunk_size=5)


@pytest.mark.parametrize(("name", "reason"), [
    ("e_branchformer", "the encoder keeps merge_cache, which"),
    ("branchformer", "24 channels .*half of cgmlp_linear_units. do not match output_size 32, which"),
    ("squeezeformer", "the encoder keeps half_att_cache, which"),
    ("efficient_conformer_stream", "the encoder keeps att_cache_2, cnn_cache_2, which"),
    ("efficient_conformer", "looks ahead or was not trained on chunks, so .* then use the offline client"),
])  # fmt: skip
def test_encoders_that_the_online_client_of_sherpa_onnx_cannot_hold(golden_checkpoint, name, reason):
    checkpoint, said = Checkpoint.open(golden_checkpoint(name)), []
    manifest, tokens = bundle_manifest(checkpoint), checkpoint.tokens
    graphs = supported_graphs(checkpoint.path, manifest, tokens, SherpaOptions(), said.append)
    assert graphs == (OFFLINE,)
    instead = "" if "looks ahead" in reason else ".*: use u2moe convert --profile streaming"
    assert re.search(f"no model-streaming.onnx: .*{reason}{instead}", said[0])


@pytest.mark.parametrize(("name", "recipe"), [
    *((name, "int8") for name in (
        "e_branchformer_moe", "squeezeformer", "branchformer", "efficient_conformer_stream", "rope_gqa_moe",
        *FRONT_ENDS)),
    ("e_branchformer_moe", "int4-experts"),
    ("branchformer", "int4"),
    *(pytest.param(*case, marks=pytest.mark.endurance) for case in (
        ("squeezeformer_full", "int8"),
        ("efficient_conformer_experts_in_the_decoder", "int4-experts"),
        ("squeezeformer", "int4"),
        ("efficient_conformer_stream", "int4"))),
])  # fmt: skip
def test_quantization_reads_layers_and_no_names_of_encoders(opened, sound, tmp_path, name, recipe):
    _, bundle, model = opened(name)
    soundfile.write(tmp_path / "sound.wav", sound[:16_000], 16_000)
    audio = [tmp_path / "sound.wav"] * ((name, recipe) == ("squeezeformer", "int8"))
    quantized, report = quantize_bundle(bundle.path, tmp_path / "quantized", RECIPES[recipe], audio=audio)
    assert quantized.manifest.quantization["num_weights"]["feed_forward"] >= 4
    frames, config, made = features(150), bundle.manifest.model, quantized.load()
    if audio:
        assert list(report["speed"]["encoder"]) == ["full context", "chunk 16, left 4"]
        assert max(each["relative"] for each in report["weight_error"].values()) < 0.2
    for chunk in (None, config.whole_chunk(8)) if config.streaming else (None,):
        found, expected = (each.encode(frames, chunk) for each in (made, model))
        # in networks of random weights: 0.15 of the deviation in int8, a correlation of about 0.9 in 4 bits
        limit = 0.15 if recipe == "int8" else 0.44
        assert 0 < np.sqrt(np.mean((found - expected) ** 2)) < limit * expected.std()


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
    ("branchformer", {"activation_type": "relu"}, UnsupportedError, "encoder_conf has unknown keys activation_type"),
    ("branchformer", {"attention_layer_type": "selfattn", "selfattention_layer_type": "selfattn"}, UnsupportedError,
     "keys selfatt"),
    ("dual_conformer", {"final_norm": True}, UnsupportedError, "final_norm is True, .* dual conformer does not supp"),
    ("dual_conformer", {"conv_inner_factor": 2}, UnsupportedError, "factor is 2, .* dual conformer does not suppor"),
    ("efficientConformer", {"cnn_module_norm": "rms_norm"}, UnsupportedError, "norm is 'rms_norm', .*: batch_norm"),
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
