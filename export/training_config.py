"""Parses train.yaml, in WeNet's old and new layouts, into architecture, features and vocabulary. Reads no tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from u2moe.export.architecture import Architecture, read_decoders
from u2moe.export.encoders.kinds import KINDS
from u2moe.export.text_files import Section, read_yaml
from u2moe.export.weights import Adapters
from u2moe.runtime.bundle.manifest import WINDOWS, DecodingConfig, FeatureConfig
from u2moe.runtime.errors import BundleError, CheckpointError, UnsupportedError
from u2moe.runtime.model.features import constants_of
from u2moe.runtime.validation import refused_as

_DROPOUT = ("dropout_rate", "positional_dropout_rate")
_TRAINING = ("gradient_checkpointing", "use_sdpa")

WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "": (
        "accum_grad", "grad_clip", "max_epoch", "log_interval", "save_interval", "save_states", "model_dir",
        "init_infos", "optim", "optim_conf", "scheduler", "scheduler_conf", "train_engine", "use_amp", "dtype",
        "syncbn", "fp16_grad_sync", "dataset", "patience", "seed", "resume", "use_cmvn", "ds_config",
        "is_json_cmvn", "raw_wav",
        # added to the files of epochs and steps
        "epoch", "step", "tag", "save_time", "lrs", "lr", "loss_dict", "cv_loss", "batch_idx", "cv_step", "grad_norm",
        "is_gradient_accumulation_boundary",
    ),
    "encoder_conf": (
        *_DROPOUT, *_TRAINING, "attention_dropout_rate", "use_dynamic_left_chunk",
        "positionwise_conv_kernel_size",  # WeNet reads it but does not use it
    ),
    "decoder_conf": (*_DROPOUT, *_TRAINING, "self_attention_dropout_rate", "src_attention_dropout_rate"),
    "model_conf": (
        "lsm_weight", "length_normalized_loss", "ignore_id",
        "ctl_weight", "logit_temp", "n_negatives",  # the loss of ctl_model
    ),
    "cmvn_conf": ("is_json_cmvn",),
    "lora_conf": ("lora_modules", "lora_attn_attr", "lora_list", "lora_dropout"),  # the tensors show their effect
    # these control how transcripts become tokens, not how tokens become text
    "tokenizer_conf": ("bpe_path", "non_lang_syms_path", "split_with_space", "is_multilingual", "num_languages"),
    "dataset_conf.fbank_conf": ("dither",),  # WeNet turns it off for recognition
    "dataset_conf.mfcc_conf": ("dither",),
    "collate_conf.feature_extraction_conf": ("dither",),
}  # fmt: skip
"""By section, keys that do not matter here; most of them affect only training."""

ONE_VALUE: Mapping[str, Mapping[str, object]] = {
    "encoder_conf": {"positionwise_layer_type": "linear", "concat_after": False},  # both keys existed until 2023
    "decoder_conf": {"use_output_layer": True, "src_attention": True, "concat_after": False},
    "collate_conf.feature_extraction_conf": {"window_type": "povey", "using_pitch": False},
}
"""The only supported value of a key, which is also WeNet's default."""
CONFIG_FILE = "train.yaml"
DEFAULT_MEL_BINS = 23
MODELS = ("asr_model", "ctl_model")  # `ctl_model` has a different loss but the same network
_FUNASR = "use FunASR to export it, and sherpa-onnx to run it"
_PRETRAINED = (
    "is a pre-trained encoder without a recognizer: fine-tune it as asr_model with --enc_init, then export the result"
)
OTHER_MODELS = {
    "transducer": "is not supported: train its encoder as asr_model, or use icefall and sherpa-onnx",
    "paraformer": f"is not a CTC network: {_FUNASR}",
    "sensevoice_small": f"takes tasks and languages as inputs: {_FUNASR}",
    "whisper": "uses its own features and prompts: use whisper.cpp, faster-whisper or sherpa-onnx",
    "firered": "has no CTC head: sherpa-onnx runs FireRedASR",
    "k2_model": "is trained for a decoding graph of k2: train it as asr_model",
    "causal_lm": "is a language model: llama.cpp and onnxruntime-genai run it",
    "w2vbert_model": _PRETRAINED,
    "wav2vec_model": _PRETRAINED,
    "bestrq_model": _PRETRAINED,
}
"""Unsupported kinds of model that WeNet trains, with an alternative for each."""
Layout = Literal["collate_conf", "dataset_conf", "present"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The content of train.yaml. If it specifies feature statistics, the encoder's `normalized_input` is true."""

    architecture: Architecture
    features: FeatureConfig
    decoding: DecodingConfig
    blank: int | None  # id of the blank; None: the id of `<blank>` in the vocabulary
    layout: Layout  # layout of the file. `collate_conf`: until October 2021. `dataset_conf`: until the end of 2023
    stated_eps: frozenset[str]  # the sections that specify `norm_eps`
    trained_decoder: bool  # false if trained with CTC only (`ctc_weight` 1): the state dict's decoders are then random
    tokenizer: Literal["char", "bpe"] | None  # None for old files, which do not specify a tokenizer
    separate: bool  # whether each token is a word. `connect_symbol` is then a space, which joins the tokens
    special_tokens: dict[str, int]  # ids by symbol; empty for old files
    symbol_table: str | None  # file name of the vocabulary
    cmvn_file: str | None  # file name of the feature statistics; None if trained without them, or if it is not named
    without_cmvn: bool  # whether `cmvn` is null: WeNet then ignores statistics, even those in the state dict
    adapters: Adapters | None  # LoRA adapters that the state dict may contain
    tied_embedding: bool  # whether the decoders' output weights are their embeddings, regardless of the state dict


def read_training_config(path: Path) -> TrainingConfig:
    """Read and check a train.yaml. Refuse keys that are neither used nor known to be irrelevant, and name them."""
    return parse_training_config(read_yaml(path, purpose="it describes the network"), path.name)


def parse_training_config(values: object, file: str = CONFIG_FILE) -> TrainingConfig:
    """Parse a loaded train.yaml as `read_training_config` does."""
    with refused_as(CheckpointError, file):
        return _parsed(Section(file, values))


def _parsed(top: Section) -> TrainingConfig:
    model = top.value("model")
    if isinstance(model, str) and model in OTHER_MODELS:
        raise UnsupportedError(f"{top.file}: model is {model!r}, which {OTHER_MODELS[model]}")
    top.choice("model", "asr_model", MODELS)
    for key in ("predictor", "joint", "lfmmi_dir"):
        if top.value(key) not in (None, "", {}):
            raise top.unsupported(key, top.value(key), ("null",))
    top.choice("ctc", "ctc", ("ctc",))
    vocab_size = top.integer("output_dim")
    if top.integer("vocab_size", vocab_size) != vocab_size:
        raise top.wrong("vocab_size", top.value("vocab_size"), f"equal to output_dim {vocab_size}")
    features = read_features(top)
    if top.integer("input_dim") != features.size:
        name, default = ("num_ceps", 40) if features.num_ceps else ("num_mel_bins", DEFAULT_MEL_BINS)
        expected = f"equal to {name}, which is {features.size} ({default} if not stated)"
        raise top.wrong("input_dim", top.value("input_dim"), expected)
    normalized, cmvn_file = _normalization(top)
    encoder = KINDS[top.choice("encoder", "conformer", tuple(KINDS))].read(top)
    encoder = replace(encoder, normalized_input=normalized)
    tokenizer, separate, special_tokens, symbol_table = _tokenizer(top, vocab_size)
    left, right, tied = read_decoders(top, vocab_size, encoder.dim)
    blank = _blank(top, vocab_size, special_tokens)
    decoding, non_blank_memory = _decoding(top)
    lora, adapters = top.section("lora_conf"), None
    if lora.values:
        adapters = Adapters(rank=lora.integer("lora_rank"), alpha=lora.number("lora_alpha", 8.0))
    trained_decoder = decoding.ctc_weight < 1
    new = ("model", "tokenizer", "tokenizer_conf", "ctc", "ctc_conf", "cmvn", "cmvn_conf")
    layout: Layout = "collate_conf" if "collate_conf" in top else "dataset_conf"
    layout = "present" if any(key in top for key in new) else layout
    confs = ("encoder_conf", "decoder_conf")
    stated_eps = frozenset(name for name in confs if "norm_eps" in top.section(name, is_whole=False))
    top.finish(WITHOUT_EFFECT, ONE_VALUE)
    if not trained_decoder:
        left = right = None
    sos, eos = (special_tokens.get(symbol, vocab_size - 1) for symbol in ("<sos>", "<eos>"))
    architecture = Architecture(
        encoder=encoder, left_decoder=left, right_decoder=right, vocab_size=vocab_size, sos=sos, eos=eos,
        blank=blank or 0, non_blank_memory=non_blank_memory,
    )  # fmt: skip
    return TrainingConfig(
        architecture=architecture, features=features, decoding=decoding, blank=blank, layout=layout,
        stated_eps=stated_eps, trained_decoder=trained_decoder, tokenizer=tokenizer, separate=separate,
        special_tokens=special_tokens, symbol_table=symbol_table, cmvn_file=cmvn_file,
        without_cmvn="cmvn" in top and not normalized, adapters=adapters, tied_embedding=tied,
    )  # fmt: skip


def read_features(top: Section) -> FeatureConfig:
    """Return the front end that dataset_conf and collate_conf describe."""
    dataset, collate = top.section("dataset_conf", is_whole=False), top.section("collate_conf", is_whole=False)
    if "fbank_conf" not in dataset and top.value("raw_wav") not in (None, True):
        raise top.unsupported("raw_wav", top.value("raw_wav"), ("True",))  # features made by Kaldi; settings unknown
    settings: dict[str, Any] = {"sample_rate": dataset.section("resample_conf").integer("resample_rate", 16000)}
    old = collate.section("feature_extraction_conf", is_whole=False)
    if dataset.choice("feats_type", "fbank", ("fbank", "mfcc")) == "mfcc":
        conf = dataset.section("mfcc_conf")
        settings["num_ceps"] = conf.integer("num_ceps", 40)
        settings |= {"low_hz": conf.number("low_freq", 20.0), "high_hz": conf.number("high_freq", 0.0)}
        settings["num_mel_bins"] = conf.integer("num_mel_bins", DEFAULT_MEL_BINS)
    elif "fbank_conf" in dataset or "feature_type" not in old:
        conf = dataset.section("fbank_conf")
        settings["window"] = conf.choice("window_type", "povey", WINDOWS)
        settings["num_mel_bins"] = conf.integer("num_mel_bins", DEFAULT_MEL_BINS)
    else:  # releases before 2021
        conf = collate.section("feature_extraction_conf")
        conf.choice("feature_type", "fbank", ("fbank",))
        settings["num_mel_bins"] = conf.integer("mel_bins")
        settings["sample_rate"] = conf.integer("resample", settings["sample_rate"])
    settings |= {
        "frame_length_ms": conf.number("frame_length", 25.0),
        "frame_shift_ms": conf.number("frame_shift", 10.0),
    }
    try:
        with refused_as(CheckpointError, f"{top.file}: dataset_conf"):
            features = FeatureConfig(**settings)
            constants_of(features)
    except BundleError as error:
        raise UnsupportedError(f"{top.file}: dataset_conf: {error}; Kaldi also refuses so many mel bins") from error
    return features


def _normalization(top: Section) -> tuple[bool, str | None]:
    """Return whether CMVN statistics are used, and their file. An old train.yaml has only a top-level `cmvn_file`."""
    # both keys are read, so that neither counts as unknown; WeNet prefers the first
    named, at_the_top = (conf.optional_text("cmvn_file") for conf in (top.section("cmvn_conf"), top))
    cmvn_file = named or at_the_top
    if "cmvn" not in top:
        return cmvn_file is not None, cmvn_file
    if top.optional_text("cmvn") is None:
        return False, None
    return top.choice("cmvn", "global_cmvn", ("global_cmvn", "null")) == "global_cmvn", cmvn_file


def _tokenizer(top: Section, vocab_size: int) -> tuple[Literal["char", "bpe"] | None, bool, dict[str, int], str | None]:
    """Return the tokenizer, whether each token is a word, the special tokens, and the file of the vocabulary."""
    conf = top.section("tokenizer_conf")
    kinds: tuple[Literal["char", "bpe"], ...] = ("char", "bpe")
    kind = top.choice("tokenizer", "char", kinds) if "tokenizer" in top else None
    symbol_table, connect = conf.optional_text("symbol_table_path"), conf.optional_text("connect_symbol") or ""
    if connect not in (("", " ") if kind == "char" else ("",)):
        raise conf.unsupported("connect_symbol", connect, ("''", "' ' with tokenizer char"))
    specials = conf.section("special_tokens")
    ids = {name: _token(specials, name, vocab_size) for name in specials.values if isinstance(name, str)}
    return kind, connect == " ", ids, symbol_table


def _blank(top: Section, vocab_size: int, special_tokens: dict[str, int]) -> int | None:
    """Return the id of the blank, if the file specifies it."""
    conf, special = top.section("ctc_conf"), special_tokens.get("<blank>")
    if "ctc_blank_id" not in conf:
        return special
    blank = _token(conf, "ctc_blank_id", vocab_size)
    if special not in (None, blank):
        raise conf.wrong("ctc_blank_id", blank, f"equal to tokenizer_conf.special_tokens.<blank> {special}")
    return blank


def _token(conf: Section, key: str, vocab_size: int) -> int:
    token = conf.integer(key, least=0)
    if token >= vocab_size:
        raise conf.wrong(key, token, f"a token id below output_dim {vocab_size}")
    return token


def _decoding(top: Section) -> tuple[DecodingConfig, bool]:
    """Return the score weights of the second pass, and whether its decoders see only non-blank frames."""
    conf = top.section("model_conf")
    ctc_weight = conf.number("ctc_weight", 0.5, least=0.0, most=1.0)
    if ctc_weight == 0:
        raise conf.unsupported("ctc_weight", ctc_weight, ("more than 0, because recognition needs a trained CTC head",))
    reverse_weight = conf.number("reverse_weight", 0.0, least=0.0, most=1.0)
    non_blank_memory = conf.flag("apply_non_blank_embedding", default=False)
    return DecodingConfig(ctc_weight=ctc_weight, reverse_weight=reverse_weight), non_blank_memory
