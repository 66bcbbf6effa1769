"""Our train.yaml files are also valid for WeNet: a published checkpoint runs there unchanged. The keys are those that
wenet/bin/recognize.py of WeNet's main branch (December 2025) reads without a default, and those that it passes on as
keyword arguments, where any other is a TypeError."""

from pathlib import Path

import pytest
import yaml

from u2moe.export.random_checkpoint import PRESETS, random_config, write_random_checkpoint

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "examples" / "train_demo" / "checkpoint"

NEEDED = (
    "input_dim", "output_dim", "encoder_conf", "decoder_conf", "model_conf", "tokenizer", "dataset_conf.filter_conf",
    "dataset_conf.batch_conf", "dataset_conf.fbank_conf", "tokenizer_conf.symbol_table_path",
    "tokenizer_conf.non_lang_syms_path", "tokenizer_conf.bpe_path", "cmvn_conf.cmvn_file", "cmvn_conf.is_json_cmvn",
)  # fmt: skip
FEED_FORWARD = {"mlp_type", "mlp_bias", "n_expert", "n_expert_activated"}
ATTENTION = {"attention_heads", "query_bias", "key_bias", "value_bias", "n_kv_head", "head_dim", "use_sdpa"}
LAYERS = FEED_FORWARD | ATTENTION | {
    "linear_units", "num_blocks", "dropout_rate", "positional_dropout_rate", "input_layer", "normalize_before",
    "activation_type", "gradient_checkpointing", "layer_norm_type", "norm_eps",
}  # fmt: skip
KEYWORDS = {
    "encoder_conf": LAYERS | {
        "output_size", "attention_dropout_rate", "pos_enc_layer_type", "static_chunk_size", "use_dynamic_chunk",
        "use_dynamic_left_chunk", "positionwise_conv_kernel_size", "macaron_style", "selfattention_layer_type",
        "use_cnn_module", "cnn_module_kernel", "causal", "cnn_module_norm", "conv_bias", "conv_norm_eps",
        "conv_inner_factor", "final_norm",
    },
    "decoder_conf": LAYERS | {
        "r_num_blocks", "self_attention_dropout_rate", "src_attention_dropout_rate", "use_output_layer",
        "src_attention", "tie_word_embedding",
    },
    "model_conf": {
        "ctc_weight", "ignore_id", "reverse_weight", "lsm_weight", "length_normalized_loss",
        "apply_non_blank_embedding",
    },
    "dataset_conf.filter_conf": {
        "max_length", "min_length", "token_max_length", "token_min_length", "min_output_input_ratio",
        "max_output_input_ratio",
    },
    "dataset_conf.fbank_conf": {"num_mel_bins", "frame_length", "frame_shift", "dither", "window_type"},
    "dataset_conf.resample_conf": {"resample_rate"},
}  # fmt: skip


def value_at(config, path):
    for key in path.split("."):
        config = config[key]
    return config


CONFIGS = {
    "demo": (PUBLISHED / "train.yaml").read_text(encoding="utf-8"),
    **{name: yaml.dump(random_config(**preset)) for name, preset in PRESETS.items()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_wenet_finds_its_keys(name):
    config = yaml.safe_load(CONFIGS[name])
    for path in NEEDED:
        value_at(config, path)
    for path, known in KEYWORDS.items():
        assert value_at(config, path).keys() <= known, path
    assert config["cmvn"] == "global_cmvn"
    assert config["tokenizer"] in ("char", "bpe")
    assert config["vocab_size"] == config["output_dim"]


@pytest.mark.parametrize("directory", ["published", "random"])
def test_wenet_finds_its_files(directory, tmp_path):
    """recognize.py opens them by these names, relative to its working directory."""
    folder = PUBLISHED
    if directory == "random":
        folder = tmp_path
        write_random_checkpoint(folder, random_config(vocab_size=10))
    config = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    files = [value_at(config, path) for path in ("tokenizer_conf.symbol_table_path", "cmvn_conf.cmvn_file")]
    if config["tokenizer"] == "bpe":
        files.append(config["tokenizer_conf"]["bpe_path"])
    for file in files:
        assert (folder / Path(file).name).is_file(), file
        assert directory == "random" or Path(file).name == file
