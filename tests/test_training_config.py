"""Every key of a train.yaml is honoured, knowingly ignored, or refused by name."""

import copy

import pytest
import yaml

from u2moe.export.random_checkpoint import old_layout, random_config
from u2moe.export.training_config import OTHER_MODELS, parse_training_config, read_training_config
from u2moe.runtime import CheckpointError, UnsupportedError

# The settings of WeNet's own recipes for U2++, as its training merges them.
OLD_RECIPE = """
accum_grad: 4
cmvn_file: exp/conformer/global_cmvn
dataset_conf:
  batch_conf: {batch_size: 16, batch_type: static}
  fbank_conf: {dither: 0.1, frame_length: 25, frame_shift: 10, num_mel_bins: 80}
  filter_conf: {max_length: 40960, min_length: 0, token_max_length: 200, token_min_length: 1}
  resample_conf: {resample_rate: 16000}
  shuffle: true
  shuffle_conf: {shuffle_size: 1500}
  sort: true
  sort_conf: {sort_size: 500}
  spec_aug: true
  spec_aug_conf: {max_f: 10, max_t: 50, num_f_mask: 2, num_t_mask: 2}
  spec_sub: true
  spec_sub_conf: {max_t: 30, num_t_sub: 3}
  speed_perturb: true
decoder: bitransformer
decoder_conf: {attention_heads: 8, dropout_rate: 0.1, linear_units: 2048, num_blocks: 3, positional_dropout_rate: 0.1,
  r_num_blocks: 3, self_attention_dropout_rate: 0.1, src_attention_dropout_rate: 0.1}
encoder: conformer
encoder_conf: {activation_type: swish, attention_dropout_rate: 0.1, attention_heads: 8, causal: true,
  cnn_module_kernel: 15, cnn_module_norm: layer_norm, dropout_rate: 0.1, input_layer: conv2d, linear_units: 2048,
  normalize_before: true, num_blocks: 12, output_size: 512, pos_enc_layer_type: rel_pos, positional_dropout_rate: 0.1,
  selfattention_layer_type: rel_selfattn, use_cnn_module: true, use_dynamic_chunk: true, use_dynamic_left_chunk: false}
grad_clip: 5
input_dim: 80
is_json_cmvn: true
lfmmi_dir: ''
log_interval: 100
max_epoch: 50
model_conf: {ctc_weight: 0.3, length_normalized_loss: false, lsm_weight: 0.1, reverse_weight: 0.3}
optim: adam
optim_conf: {lr: 0.001}
output_dim: 5537
scheduler: warmuplr
scheduler_conf: {warmup_steps: 5000}
"""
OLDEST_FEATURES = {
    "feature_extraction_conf": {"feature_type": "fbank", "mel_bins": 80, "frame_shift": 10, "frame_length": 25},
    "feature_dither": 0.0,
}


def changed(path, value, **arguments):
    """A small configuration with the value at a dotted path replaced."""
    config = copy.deepcopy(random_config(**arguments))
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    return config


def test_an_old_file_is_read(tmp_path):
    (tmp_path / "train.yaml").write_text(OLD_RECIPE, encoding="utf-8")
    config = read_training_config(tmp_path / "train.yaml")
    encoder, decoder = config.architecture.encoder, config.architecture.right_decoder
    assert (encoder.kind, encoder.dim, encoder.num_blocks, encoder.macaron) == ("conformer", 512, 12, True)
    assert (encoder.convolution.kernel, encoder.convolution.causal, encoder.convolution.channels) == (15, True, 512)
    assert encoder.attention.relative
    assert encoder.streaming
    assert encoder.normalized_input
    assert (decoder.num_blocks, decoder.feed_forward.activation) == (3, "relu")
    assert (config.architecture.sos, config.architecture.eos, config.architecture.blank) == (5536, 5536, 0)
    assert (config.tokenizer, config.symbol_table, config.cmvn_file) == (None, None, "exp/conformer/global_cmvn")
    assert (config.decoding.ctc_weight, config.decoding.reverse_weight) == (0.3, 0.3)


def test_defaults_are_those_of_wenet():
    values = {"input_dim": 23, "output_dim": 9, "encoder_conf": {}, "decoder_conf": {}}
    config = parse_training_config(values)
    encoder, left = config.architecture.encoder, config.architecture.left_decoder
    assert (encoder.kind, encoder.dim, encoder.num_blocks, encoder.subsampling) == ("conformer", 256, 6, "conv2d")
    assert (encoder.convolution.kernel, encoder.convolution.causal) == (15, False)
    assert encoder.convolution.norm.kind == "batch_norm"
    assert not encoder.streaming
    assert not encoder.normalized_input
    assert (left.num_blocks, left.feed_forward.hidden) == (6, 2048)
    assert config.architecture.right_decoder.num_blocks == 0
    assert (config.decoding.ctc_weight, config.decoding.reverse_weight) == (0.5, 0.0)
    transformer = parse_training_config(values | {"encoder": "transformer"}).architecture.encoder
    assert transformer.positions == "abs_pos"
    assert not transformer.attention.relative
    assert transformer.feed_forward.activation == "relu"


def test_null_statistics_special_tokens_old_front_ends_and_too_many_mel_bins():
    config = random_config()
    del config["dataset_conf"]
    features = parse_training_config({**config, "collate_conf": OLDEST_FEATURES}).features
    assert (features.num_mel_bins, features.frame_length_ms, features.sample_rate) == (80, 25.0, 16000)
    resampled = copy.deepcopy(OLDEST_FEATURES)
    resampled["feature_extraction_conf"]["resample"] = 8000
    assert parse_training_config({**config, "collate_conf": resampled}).features.sample_rate == 8000
    pitched = copy.deepcopy(OLDEST_FEATURES)
    pitched["feature_extraction_conf"]["using_pitch"] = True
    with pytest.raises(UnsupportedError, match=r"feature_extraction_conf.using_pitch is True"):
        parse_training_config({**config, "collate_conf": pitched})
    assert not parse_training_config(changed("cmvn", "null")).architecture.encoder.normalized_input
    assert parse_training_config(changed("tokenizer_conf.special_tokens.<pad>", 9)).special_tokens["<pad>"] == 9
    config = changed("dataset_conf.fbank_conf.num_mel_bins", 128)
    with pytest.raises(UnsupportedError, match=r"train.yaml: dataset_conf: .*128.* a mel band contains no FFT bin"):
        parse_training_config({**config, "input_dim": 128})


UNSUPPORTED = {
    "model": ("salmonn",),
    "predictor": ("rnn",),
    "decoder": ("null", "sanm_decoder"),
    "model_conf.ctc_weight": (0.0,),
    "joint": ("transducer_joint",),
    "lfmmi_dir": ("data/local/lfmmi",),
    "ctc": ("lfmmi",),
    "cmvn": ("utterance_cmvn",),
    "encoder": ("sanm_encoder", None),
    "tokenizer": ("sentencepiece", "whisper", "paraformer"),
    "tokenizer_conf.connect_symbol": ("-",),
    "dataset_conf.feats_type": ("log_mel_spectrogram", "w2vbert_fbank"),
    "dataset_conf.fbank_conf.window_type": ("kaiser",),
    "encoder_conf.input_layer": ("embed", "dwconv2d4", "firered_conv2d4"),
    "encoder_conf.pos_enc_layer_type": ("abs_pos_paraformer", "rel_pos_firered"),
    "encoder_conf.selfattention_layer_type": ("crossattn", "grouped_rel_selfattn"),
    "encoder_conf.mlp_type": ("mixture",),
    "encoder_conf.activation_type": ("mish",),
    "encoder_conf.cnn_module_norm": ("group_norm",),
    "encoder_conf.layer_norm_type": ("batch_norm",),
    "encoder_conf.concat_after": (True,),
    "encoder_conf.positionwise_layer_type": ("conv1d",),
    "decoder_conf.input_layer": ("rel_pos", "no_pos"),
    "decoder_conf.use_output_layer": (False,),
    "decoder_conf.src_attention": (False,),
    "decoder_conf.concat_after": (True,),
    "decoder_conf.activation_type": ("swiglu",),
    "decoder_conf.mlp_type": ("gated_moe",),
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, own in UNSUPPORTED.items() for value in own])
def test_what_is_not_supported_is_refused_by_name(path, value):
    with pytest.raises(UnsupportedError) as error:
        parse_training_config(changed(path, value))
    assert f"train.yaml: {path} is {value!r}, which is not supported; supported: " in str(error.value)


@pytest.mark.parametrize("model", sorted(OTHER_MODELS))
def test_other_models_are_refused_with_what_to_use_instead(model):
    with pytest.raises(UnsupportedError, match=rf"train.yaml: model is '{model}', which \w+ .+: .+"):
        parse_training_config(changed("model", model))


def test_features_of_kaldi_old_files_without_statistics_and_keys_of_others():
    """Their settings were never in the file. Later releases of WeNet compute features and ignore the key."""
    config = random_config()
    assert parse_training_config({**config, "raw_wav": False}).features.num_mel_bins == 80
    del config["dataset_conf"]
    with pytest.raises(UnsupportedError, match="raw_wav is False"):
        parse_training_config({**config, "raw_wav": False, "collate_conf": OLDEST_FEATURES})
    values = old_layout(random_config())
    assert parse_training_config(values).architecture.encoder.normalized_input
    values["cmvn_file"] = None
    assert not parse_training_config(values).architecture.encoder.normalized_input
    # yaml 1.1 reads 1e-5 as text
    config = parse_training_config(random_config(encoder_conf={"norm_eps": "1e-6"}))
    assert config.architecture.encoder.norm.eps == 1e-6
    with pytest.raises(UnsupportedError, match="encoder_conf has unknown keys macaron_style"):
        parse_training_config(changed("encoder_conf.macaron_style", value=True, encoder="transformer"))
    with pytest.raises(UnsupportedError, match="'rel_selfattn', which is not supported; supported: selfattn"):
        parse_training_config(changed("encoder_conf.selfattention_layer_type", "rel_selfattn", encoder="transformer"))


@pytest.mark.parametrize(
    "path",
    [
        "encoder_conf.num_experts", "encoder_conf.efficient_conf", "decoder_conf.src_key_bias",
        "decoder_conf.r_blocks", "model_conf.focal_weight", "ctc_conf.blank_id", "tokenizer_conf.upper_case",
        "dataset_conf.resample_conf.resample_rates", "cmvn_conf.norm_var", "dataset_conf.fbank_conf.high_freq",
        "distillation",
    ],
)  # fmt: skip
def test_unknown_keys_are_refused_by_name(path):
    with pytest.raises(UnsupportedError, match="has unknown keys ") as error:
        parse_training_config(changed(path, 1))
    section, _, key = path.rpartition(".")
    assert (
        f"{section or 'train.yaml'} has unknown keys {key}, which may change the network: "
        "remove those that have no effect" in str(error.value)
    )


@pytest.mark.parametrize(("encoder", "conf", "message"), [
    ("dual_conformer", {"final_norm": True}, "final_norm is True, .* WeNet's dual conformer does not support it"),
    ("dual_conformer", {"conv_inner_factor": 2},
     "conv_inner_factor is 2, .* WeNet's dual conformer does not support it"),
    ("efficientConformer", {"cnn_module_norm": "rms_norm"}, "cnn_module_norm is 'rms_norm', .*: batch_norm, layer_"),
    ("branchformer", {"activation_type": "relu"}, "encoder_conf has unknown keys activation_type"),
    ("branchformer", {"attention_layer_type": "selfattn", "selfattention_layer_type": "selfattn"}, "keys selfatt"),
])  # fmt: skip
def test_what_wenet_cannot_run_is_refused(encoder, conf, message):
    with pytest.raises(UnsupportedError, match=message):
        parse_training_config(random_config(encoder=encoder, encoder_conf=conf))


@pytest.mark.parametrize(("path", "value", "message"), [
    ("input_dim", 83, r"input_dim must be equal to num_mel_bins, which is 80 \(23 if not stated\), got 83"),
    ("vocab_size", 61, "vocab_size must be equal to output_dim 60, got 61"),
    ("output_dim", None, "output_dim must be an integer, got None"),
    ("encoder_conf", [1], r"encoder_conf must be an object, got \[1\]"),
    ("encoder_conf.output_size", "256", "output_size must be an integer, got '256'"),
    ("encoder_conf.output_size", 33, "output_size must be even"),
    ("encoder_conf.num_blocks", True, "num_blocks must be an integer, got True"),
    ("encoder_conf.attention_heads", 5, "attention_heads must be a divisor of the model width 32"),
    ("encoder_conf.n_kv_head", 2, "head_dim must be given together with n_kv_head, got None"),
    ("encoder_conf.head_dim", 16, "head_dim must be output_size 32 / attention_heads 4 for rel_selfattn"),
    ("encoder_conf.pos_enc_layer_type", "rope_pos", "must be rope_abs_selfattn if and only if pos_enc_layer_type"),
    ("encoder_conf.selfattention_layer_type", "rope_abs_selfattn", "if and only if pos_enc_layer_type is rope_pos"),
    ("encoder_conf",
     {"pos_enc_layer_type": "rope_pos", "selfattention_layer_type": "rope_abs_selfattn", "head_dim": 12},
     "head_dim must be even and equal to output_size 256 / attention_heads for rope_pos, got 12"),
    ("encoder_conf", {"input_layer": "stack_n_frames", "pos_enc_layer_type": "abs_pos", "output_size": 80},
     "output_size must be 160, the size of stacked frames, with pos_enc_layer_type abs_pos, got 80"),
    ("encoder_conf", {"n_kv_head": 3, "head_dim": 8}, "n_kv_head must be a divisor of attention_heads 4, got 3"),
    ("encoder_conf", {"mlp_type": "moe", "n_expert": 4, "n_expert_activated": 5},
     "activated must be at most n_expert 4"),
    ("encoder_conf", {"cnn_module_kernel": 8}, "cnn_module_kernel must be odd for a convolution that is not causal"),
    ("encoder_conf.causal", "yes", "causal must be true or false, got 'yes'"),
    ("encoder_conf.norm_eps", "small", "norm_eps must be a number between 0 and 1, got 'small'"),
    ("encoder_conf.norm_eps", -1.0, "norm_eps must be a number between 0 and 1, got -1.0"),
    ("ctc_conf.ctc_blank_id", 5, "ctc_blank_id must be equal to tokenizer_conf.special_tokens.<blank> 0, got 5"),
    ("ctc_conf.ctc_blank_id", 60, "ctc_blank_id must be a token id below output_dim 60, got 60"),
    ("tokenizer_conf.special_tokens.<sos>", 60, "<sos> must be a token id below output_dim 60, got 60"),
    ("tokenizer_conf.special_tokens.<sos>", None, "<sos> must be an integer, got None"),
    ("model_conf.reverse_weight", 1.5, "reverse_weight must be a number between 0 and 1, got 1.5"),
    ("dataset_conf.fbank_conf.frame_shift", 30, "dataset_conf: frame_shift_ms"),
    ("dataset_conf.resample_conf.resample_rate", 16e3, "resample_rate must be an integer, got 16000.0"),
    ("cmvn_conf.cmvn_file", 3, "cmvn_file must be a string or null, got 3"),
])  # fmt: skip
def test_what_no_checkpoint_can_have_is_an_error(path, value, message):
    with pytest.raises(CheckpointError, match=f"train.yaml: .*{message}"):
        parse_training_config(changed(path, value))


@pytest.mark.parametrize(("kind", "smallest"), [("conv2d", 7), ("conv2d6", 11), ("conv2d8", 15)])
def test_subsampling_needs_frequencies(kind, smallest):
    arguments = {"encoder_conf": {"input_layer": kind}}
    parse_training_config(random_config(num_mel_bins=smallest, **arguments))
    message = f"input_dim must be at least {smallest} with input_layer {kind}, got {smallest - 1}"
    with pytest.raises(CheckpointError, match=message):
        parse_training_config(random_config(num_mel_bins=smallest - 1, **arguments))


def test_chunks_that_were_trained_for_decide_about_streaming_unless_convolutions_see_beyond():
    def streaming(**conf):
        return parse_training_config(random_config(encoder_conf=conf)).architecture.encoder.streaming

    assert streaming()
    assert not streaming(use_dynamic_chunk=False)
    assert not streaming(use_dynamic_chunk=False, static_chunk_size=-1)
    assert not streaming(causal=False, cnn_module_kernel=7)
    # WeNet masks chunks, but its convolution sees beyond them: no stream can reproduce that
    conf = {"static_chunk_size": 16, "use_dynamic_chunk": False, "causal": False, "cnn_module_kernel": 7}
    with pytest.raises(UnsupportedError, match="static_chunk_size is 16"):
        parse_training_config(random_config(encoder_conf=conf))
    assert parse_training_config(random_config(encoder_conf=conf | {"causal": True})).architecture.encoder.streaming
    no_convolution = parse_training_config(random_config(encoder_conf=conf | {"use_cnn_module": False}))
    assert no_convolution.architecture.encoder.streaming


@pytest.mark.parametrize(("changes", "named", "file"), [
    ({}, True, "data/train/global_cmvn"),
    ({"cmvn": None, "cmvn_conf": {"cmvn_file": None, "is_json_cmvn": None}}, False, None),
    ({"cmvn": None}, False, None),
    ({"cmvn_conf": None}, True, None),
])  # fmt: skip
def test_whether_statistics_were_used(changes, named, file):
    config = parse_training_config(random_config(changes=changes))
    assert (config.architecture.encoder.normalized_input, config.cmvn_file) == (named, file)


def test_files_that_are_not_text(tmp_path):
    with pytest.raises(CheckpointError, match=r"train.yaml: cannot be read: No such file"):
        read_training_config(tmp_path / "train.yaml")
    (tmp_path / "train.yaml").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(CheckpointError, match="is not UTF-8 text: invalid start byte at byte 4"):
        read_training_config(tmp_path / "train.yaml")


LAUGHS = "lol0: &lol0 [ha, ha]\n" + "".join(
    f"lol{i}: &lol{i} [{', '.join([f'*lol{i - 1}'] * 10)}]\n" for i in range(1, 20)
)
"""Aliases that would exceed any memory if expanded."""


MERGES = f"a: &a {{{', '.join(f'k{i}: 1' for i in range(400))}}}\nb: {{<<: [{', '.join(['*a'] * 400)}]}}\n"


@pytest.mark.parametrize(("text", "message"), [
    ("", "must be an object, got None"),
    ("- a\n- b", "must be an object, got .'a', 'b'."),
    ("a: [1", "is not plain yaml"),
    (f"{LAUGHS}output_dim: *lol19", r"output_dim must be an integer, got \[\[\["),
    (f"{LAUGHS}predictor: *lol19", r"predictor is \[\[\["),
    (MERGES, "is not plain yaml: ConstructorError: merges .<<. expand to more than 100,000 keys"),
    ("predictor: &a [*a]", r"predictor is \[\["),
    ("a: " + "x" * (1 << 18), "is longer than the limit of 262,144 characters"),
    ("a: " + "[" * 100_000, "is not plain yaml: RecursionError"),
    ("a: !!timestamp x", "is not plain yaml: AttributeError"),
    ("a: !!bool x", "is not plain yaml: KeyError"),
    ("a: !!int ''", "is not plain yaml: IndexError"),
    ("a: !!python/object/apply:os.system [ls]", "is not plain yaml: ConstructorError"),
    ("? [a]\n: b", "is not plain yaml: ConstructorError"),
])  # fmt: skip
def test_yaml_that_is_not_plain_is_refused(text, message, tmp_path):
    (tmp_path / "train.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"train.yaml:? {message}"):
        read_training_config(tmp_path / "train.yaml")


def test_merges_and_aliases_are_read(tmp_path):
    """Recipes share a section with `<<`; a mapping's own keys take precedence."""
    config = random_config()
    shared = {"dropout_rate": 0.1, "attention_heads": 3, "linear_units": 48}
    texts = [yaml.dump({"optim_conf": shared}).replace("optim_conf:", "optim_conf: &shared")]
    texts.append("encoder_conf:\n  <<: [*shared, {normalize_before: false}]\n")
    texts.append(
        "".join(f"  {key}: {value}\n" for key, value in config["encoder_conf"].items() if key != "linear_units")
    )
    texts.append(yaml.dump({key: value for key, value in config.items() if key != "encoder_conf"}))
    (tmp_path / "train.yaml").write_text("".join(texts), encoding="utf-8")
    merged = {**config["encoder_conf"], "linear_units": 48, "normalize_before": False}
    expected = parse_training_config({**config, "encoder_conf": merged})
    assert read_training_config(tmp_path / "train.yaml") == expected
    # yaml.dump writes aliases where two settings were one object
    config = random_config()
    config["optim_conf"] = config["scheduler_conf"] = {"lr": [0.1]}
    text = yaml.dump(config)
    assert "&id001" in text
    (tmp_path / "train.yaml").write_text(text, encoding="utf-8")
    assert read_training_config(tmp_path / "train.yaml") == parse_training_config(config)


@pytest.mark.parametrize(("path", "value", "message"), [
    ("encoder_conf.output_size", 10**9, "must be at most 1048576, got 1000000000"),
    pytest.param("encoder_conf.output_size", 1 << 20_000, "must be .* thousands of digits", id="digits"),
    ("encoder_conf.num_blocks", 1_000_000, "must be at most 256, got 1000000"),
    ("decoder_conf.r_num_blocks", 1_000_000, "must be at most 256, got 1000000"),
    ("encoder_conf.n_expert", 99_999_999, "must be at most 1048576, got 99999999"),
    ("encoder_conf.n_expert", 4096, "must be at most 2048 in each of 4 layers, got 4096"),
    ("decoder_conf.n_expert", 8192, "must be at most 4096 in each of 2 layers, got 8192"),
    pytest.param("encoder_conf.norm_eps", 10**400, "must be a number between 0 and 1, got 1000", id="large"),
    ("tokenizer_conf.symbol_table_path", "a\0b", "must be a string or null, got 'a.x00b'"),
    ("cmvn_conf.cmvn_file", "\ud800", "must be a string or null, got '.ud800'"),
])  # fmt: skip
def test_sizes_are_limited_before_anything_is_built(path, value, message):
    conf = {"mlp_type": "moe"}
    with pytest.raises(CheckpointError, match=f"train.yaml: {path} {message}"):
        parse_training_config(changed(path, value, encoder_conf=conf, decoder_conf=conf))
