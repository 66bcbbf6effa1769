"""Every key of a train.yaml is honoured, knowingly ignored, or refused by name."""

import copy
import re

import pytest
import yaml

from u2moe.export.random_checkpoint import old_layout, random_config
from u2moe.export.training_config import OTHER_MODELS, parse_training_config, read_training_config
from u2moe.runtime import CheckpointError, UnsupportedError

# The settings of WeNet's own recipes for U2++, as its training merges them.
OLD_RECIPE = """{
dataset_conf: {batch_conf: {batch_size: 16, batch_type: static}, shuffle: true, shuffle_conf: {shuffle_size: 1500},
  fbank_conf: {dither: 0.1, frame_length: 25, frame_shift: 10, num_mel_bins: 80}, sort: true, spec_aug: true,
  filter_conf: {max_length: 40960, min_length: 0, token_max_length: 200, token_min_length: 1}, spec_sub: true,
  resample_conf: {resample_rate: 16000}, sort_conf: {sort_size: 500}, spec_sub_conf: {max_t: 30, num_t_sub: 3},
  spec_aug_conf: {max_f: 10, max_t: 50, num_f_mask: 2, num_t_mask: 2}, speed_perturb: true},
decoder: bitransformer,
decoder_conf: {attention_heads: 8, dropout_rate: 0.1, linear_units: 2048, num_blocks: 3, positional_dropout_rate: 0.1,
  r_num_blocks: 3, self_attention_dropout_rate: 0.1, src_attention_dropout_rate: 0.1},
encoder: conformer,
encoder_conf: {activation_type: swish, attention_dropout_rate: 0.1, attention_heads: 8, causal: true,
  cnn_module_kernel: 15, cnn_module_norm: layer_norm, dropout_rate: 0.1, input_layer: conv2d, linear_units: 2048,
  normalize_before: true, num_blocks: 12, output_size: 512, pos_enc_layer_type: rel_pos, positional_dropout_rate: 0.1,
  selfattention_layer_type: rel_selfattn, use_cnn_module: true, use_dynamic_chunk: true, use_dynamic_left_chunk: false},
accum_grad: 4, cmvn_file: exp/conformer/global_cmvn, grad_clip: 5, input_dim: 80, is_json_cmvn: true, lfmmi_dir: '',
log_interval: 100, max_epoch: 50, optim: adam, optim_conf: {lr: 0.001}, output_dim: 5537, scheduler: warmuplr,
model_conf: {ctc_weight: 0.3, length_normalized_loss: false, lsm_weight: 0.1, reverse_weight: 0.3},
scheduler_conf: {warmup_steps: 5000}}
"""
OLDEST_FEATURES = {"feature_type": "fbank", "mel_bins": 80, "frame_shift": 10, "frame_length": 25}


def changed(path, value, config=None, **arguments):
    config = copy.deepcopy(random_config(**arguments) if config is None else config)
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
    assert (encoder.attention.relative, encoder.streaming, encoder.normalized_input) == (True, True, True)
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
    assert (encoder.convolution.norm.kind, encoder.streaming, encoder.normalized_input) == ("batch_norm", False, False)
    assert (left.num_blocks, left.feed_forward.hidden) == (6, 2048)
    assert config.architecture.right_decoder.num_blocks == 0
    assert (config.decoding.ctc_weight, config.decoding.reverse_weight) == (0.5, 0.0)
    transformer = parse_training_config(values | {"encoder": "transformer"}).architecture.encoder
    assert (transformer.positions, transformer.attention.relative) == ("abs_pos", False)
    assert transformer.feed_forward.activation == "relu"


def test_statistics_special_tokens_old_front_ends_and_too_many_mel_bins():
    """Later releases of WeNet compute features and ignore `raw_wav`."""
    config = random_config()
    assert parse_training_config({**config, "raw_wav": False}).features.num_mel_bins == 80
    del config["dataset_conf"]
    config["collate_conf"] = {"feature_extraction_conf": OLDEST_FEATURES, "feature_dither": 0.0}
    features = parse_training_config(config).features
    assert (features.num_mel_bins, features.frame_length_ms, features.sample_rate) == (80, 25.0, 16000)
    place = "collate_conf.feature_extraction_conf"
    assert parse_training_config(changed(f"{place}.resample", 8000, config)).features.sample_rate == 8000
    for path, value, message in (
        (f"{place}.using_pitch", True, r"feature_extraction_conf.using_pitch is True"),
        ("raw_wav", False, "raw_wav is False"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            parse_training_config(changed(path, value, config))
    assert not parse_training_config(changed("cmvn", "null")).architecture.encoder.normalized_input
    assert parse_training_config(changed("tokenizer_conf.special_tokens.<pad>", 9)).special_tokens["<pad>"] == 9
    config = changed("dataset_conf.fbank_conf.num_mel_bins", 128)
    with pytest.raises(UnsupportedError, match=r"train.yaml: dataset_conf: .*128.* a mel band contains no FFT bin"):
        parse_training_config({**config, "input_dim": 128})
    for changes, used in (
        ({}, (True, "data/train/global_cmvn")),
        ({"cmvn": None, "cmvn_conf": {"cmvn_file": None, "is_json_cmvn": None}}, (False, None)),
        ({"cmvn": None}, (False, None)),
        ({"cmvn_conf": None}, (True, None)),
    ):
        config = parse_training_config(random_config(changes=changes))
        assert (config.architecture.encoder.normalized_input, config.cmvn_file) == used
    # yaml 1.1 reads 1e-5 as text
    config = parse_training_config(random_config(encoder_conf={"norm_eps": "1e-6"}))
    assert config.architecture.encoder.norm.eps == 1e-6


NOT_SUPPORTED = yaml.safe_load("""{
model: [salmonn], predictor: [rnn], decoder: ["null", sanm_decoder], model_conf.ctc_weight: [0.0], ctc: [lfmmi],
joint: [transducer_joint], lfmmi_dir: [data/local/lfmmi], cmvn: [utterance_cmvn], encoder: [sanm_encoder, null],
tokenizer: [sentencepiece, whisper, paraformer], tokenizer_conf.connect_symbol: ["-"],
dataset_conf.feats_type: [log_mel_spectrogram, w2vbert_fbank], dataset_conf.fbank_conf.window_type: [kaiser],
encoder_conf.input_layer: [embed, dwconv2d4, firered_conv2d4], encoder_conf.concat_after: [true],
encoder_conf.pos_enc_layer_type: [abs_pos_paraformer, rel_pos_firered], encoder_conf.mlp_type: [mixture],
encoder_conf.selfattention_layer_type: [crossattn, grouped_rel_selfattn], encoder_conf.activation_type: [mish],
encoder_conf.cnn_module_norm: [group_norm], encoder_conf.layer_norm_type: [batch_norm],
encoder_conf.positionwise_layer_type: [conv1d], decoder_conf.input_layer: [rel_pos, no_pos],
decoder_conf.use_output_layer: [false], decoder_conf.src_attention: [false], decoder_conf.concat_after: [true],
decoder_conf.activation_type: [swiglu], decoder_conf.mlp_type: [gated_moe]}""")
UNKNOWN = """encoder_conf.num_experts encoder_conf.efficient_conf decoder_conf.src_key_bias decoder_conf.r_blocks
    model_conf.focal_weight ctc_conf.blank_id tokenizer_conf.upper_case dataset_conf.resample_conf.resample_rates
    cmvn_conf.norm_var dataset_conf.fbank_conf.high_freq distillation"""
REFUSED = [
    *((path, value, UnsupportedError, re.escape(f"{path} is {value!r}, which is not supported; supported: "))
      for path, values in NOT_SUPPORTED.items() for value in values),
    *((path, 1, UnsupportedError, "{0} has unknown keys {2}, which may change the network: remove those that have no "
       .format(*path.rpartition("."))) for path in UNKNOWN.split()),
    *(("model", model, UnsupportedError, rf"model is '{model}', which \w+ .+: .+") for model in sorted(OTHER_MODELS)),
    *((path, value, CheckpointError, message) for path, value, message in (
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
        ("encoder_conf", {"cnn_module_kernel": 8}, "cnn_module_kernel must be odd for a convolution that is not caus"),
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
        ("encoder_conf.output_size", 10**9, "output_size must be at most 1048576, got 1000000000"),
        ("encoder_conf.output_size", 1 << 20_000, "output_size must be .* thousands of digits"),
        ("encoder_conf.num_blocks", 1_000_000, "num_blocks must be at most 256, got 1000000"),
        ("decoder_conf.r_num_blocks", 1_000_000, "r_num_blocks must be at most 256, got 1000000"),
        ("encoder_conf.n_expert", 99_999_999, "n_expert must be at most 1048576, got 99999999"),
        ("encoder_conf.n_expert", 4096, "encoder_conf.n_expert must be at most 2048 in each of 4 layers, got 4096"),
        ("decoder_conf.n_expert", 8192, "decoder_conf.n_expert must be at most 4096 in each of 2 layers, got 8192"),
        ("encoder_conf.norm_eps", 10**400, "norm_eps must be a number between 0 and 1, got 1000"),
        ("tokenizer_conf.symbol_table_path", "a\0b", "symbol_table_path must be a string or null, got 'a.x00b'"),
        ("cmvn_conf.cmvn_file", "\ud800", "cmvn_file must be a string or null, got '.ud800'"))),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda number: f"{number}-{REFUSED[number][0]}")
def test_what_cannot_be_read_is_refused_by_name_before_anything_is_built(number):
    path, value, error, message = REFUSED[number]
    conf = {"mlp_type": "moe"}
    with pytest.raises(error, match=f"train.yaml:?.*{message}"):
        parse_training_config(changed(path, value, encoder_conf=conf, decoder_conf=conf))


def test_old_files_without_statistics_and_keys_of_other_encoders():
    """Their settings were never in the file."""
    values = old_layout(random_config())
    for file in (values["cmvn_file"], None):
        encoder = parse_training_config(values | {"cmvn_file": file}).architecture.encoder
        assert encoder.normalized_input == bool(file)
    for key, value, message in (
        ("macaron_style", True, "encoder_conf has unknown keys macaron_style"),
        ("selfattention_layer_type", "rel_selfattn", "'rel_selfattn', which is not supported; supported: selfattn"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            parse_training_config(changed(f"encoder_conf.{key}", value, encoder="transformer"))


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
        streaming(**conf)
    assert streaming(**conf | {"causal": True})
    assert streaming(**conf, use_cnn_module=False)


LAUGHS = "lol0: &lol0 [ha, ha]\n" + "".join(
    f"lol{i}: &lol{i} [{', '.join([f'*lol{i - 1}'] * 10)}]\n" for i in range(1, 20)
)
"""Aliases that would exceed any memory if expanded."""
MERGES = f"a: &a {{{', '.join(f'k{i}: 1' for i in range(400))}}}\nb: {{<<: [{', '.join(['*a'] * 400)}]}}\n"


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read: No such file"),
    (b"PK\x03\x04\xff\xfe", "is not UTF-8 text: invalid start byte at byte 4"),
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
    file = tmp_path / "train.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"train.yaml:? {message}"):
        read_training_config(file)


def test_merges_and_aliases_are_read(tmp_path):
    """Recipes share a section with `<<`; a mapping's own keys take precedence."""
    config, file = random_config(), tmp_path / "train.yaml"
    own = {key: value for key, value in config["encoder_conf"].items() if key != "linear_units"}
    shared = yaml.dump({"optim_conf": {"dropout_rate": 0.1, "attention_heads": 3, "linear_units": 48}})
    file.write_text(
        shared.replace("optim_conf:", "optim_conf: &shared")
        + "encoder_conf:\n  <<: [*shared, {normalize_before: false}]\n"
        + "".join(f"  {key}: {value}\n" for key, value in own.items())
        + yaml.dump({key: value for key, value in config.items() if key != "encoder_conf"}),
        encoding="utf-8",
    )
    merged = {**config["encoder_conf"], "linear_units": 48, "normalize_before": False}
    assert read_training_config(file) == parse_training_config({**config, "encoder_conf": merged})
    # yaml.dump writes aliases where two settings were one object
    config["optim_conf"] = config["scheduler_conf"] = {"lr": [0.1]}
    file.write_text(yaml.dump(config), encoding="utf-8")
    assert "&id001" in file.read_text(encoding="utf-8")
    assert read_training_config(file) == parse_training_config(config)
