"""train.yaml, in WeNet's old and new layouts, to the architecture and what surrounds it. Reads no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import yaml

from u2moe.export.architecture import (
    Activation,
    Architecture,
    Attention,
    Convolution,
    Decoder,
    Encoder,
    FeedForward,
    Norm,
    NormKind,
    SubsamplingKind,
)
from u2moe.export.yaml_section import Section
from u2moe.runtime.errors import CheckpointError
from u2moe.runtime.manifest import DecodingConfig, FeatureConfig

CONFIG_FILE = "train.yaml"
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
LAYER_NORMS: tuple[NormKind, ...] = ("layer_norm", "rms_norm")
CONVOLUTION_NORMS: tuple[NormKind, ...] = get_args(NormKind)
SUBSAMPLINGS: tuple[SubsamplingKind, ...] = get_args(SubsamplingKind)
FEED_FORWARDS: dict[str, Literal["dense", "gated", "moe"]] = {
    "position_wise_feed_forward": "dense",
    "gated": "gated",
    "moe": "moe",
}
SPECIAL_TOKENS = ("<blank>", "<unk>", "<sos>", "<eos>")

TRAINING_KEYS = (
    *(
        "accum_grad",
        "grad_clip",
        "max_epoch",
        "log_interval",
        "save_interval",
        "save_states",
        "model_dir",
        "init_infos",
    ),
    *(
        "optim",
        "optim_conf",
        "scheduler",
        "scheduler_conf",
        "train_engine",
        "use_amp",
        "dtype",
        "syncbn",
        "fp16_grad_sync",
    ),
    *("dataset", "raw_wav", "patience", "seed", "resume", "use_cmvn", "ds_config", "tag", "epoch", "step", "save_time"),
)
"""Top-level keys that say how the network was trained, not what it computes."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What train.yaml says; the network is normalised (`Encoder.normalized_input`) if it names statistics."""

    architecture: Architecture
    features: FeatureConfig
    decoding: DecodingConfig
    tokenizer: Literal["char", "bpe"] | None
    """None in old files, which do not say."""
    special_tokens: dict[str, int]
    """Ids by symbol, empty in old files."""
    symbol_table: str | None
    """File name of the vocabulary."""
    cmvn_file: str | None
    """File name of the feature statistics; None when trained without, or when the file is not named."""
    tied_embedding: bool
    """The decoders' output weights are their embeddings, whatever the state dict says."""


def read_training_config(path: Path) -> TrainingConfig:
    """Read and check a train.yaml; every key is honoured, knowingly ignored, or refused by name."""
    return parse_training_config(_load_yaml(path), path.name)


def parse_training_config(values: object, file: str = CONFIG_FILE) -> TrainingConfig:
    """The same for a mapping that is already loaded."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must be a mapping of settings, found {type(values).__name__}")
    top = Section(file, "", values)
    top.choice("model", "asr_model", ("asr_model",))
    for key in ("predictor", "joint", "lora_conf", "lfmmi_dir"):
        if top.value(key) not in (None, "", {}):
            raise top.unsupported(key, top.value(key), ("CTC and attention without it",))
    top.choice("ctc", "ctc", ("ctc",))
    vocab_size = top.integer("output_dim")
    if top.integer("vocab_size", vocab_size) != vocab_size:
        raise top.wrong("vocab_size", top.value("vocab_size"), f"equal to output_dim {vocab_size}")
    features = _features(top)
    if top.integer("input_dim") != features.num_mel_bins:
        raise top.wrong("input_dim", top.value("input_dim"), f"equal to num_mel_bins {features.num_mel_bins}")
    normalized, cmvn_file = _normalization(top)
    tokenizer, special_tokens, symbol_table = _tokenizer(top, vocab_size)
    encoder = _encoder(top, normalized)
    left, right, tied = _decoders(top, vocab_size, encoder.dim)
    blank_id = _blank(top, vocab_size)
    decoding = _decoding(top)
    top.ignore(*TRAINING_KEYS)
    top.finish()
    return TrainingConfig(
        architecture=Architecture(
            encoder=encoder,
            left_decoder=left,
            right_decoder=right,
            vocab_size=vocab_size,
            sos=special_tokens.get("<sos>", vocab_size - 1),
            eos=special_tokens.get("<eos>", vocab_size - 1),
            blank=blank_id,
        ),
        features=features,
        decoding=decoding,
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        symbol_table=symbol_table,
        cmvn_file=cmvn_file,
        tied_embedding=tied,
    )


def _load_yaml(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; a checkpoint directory needs it") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not a yaml file: {error}") from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: is not plain yaml: {error}") from error


def _features(top: Section) -> FeatureConfig:
    dataset = top.section("dataset_conf")
    dataset.choice("feats_type", "fbank", ("fbank",))
    sample_rate = dataset.section("resample_conf").integer("resample_rate", 16000)
    collate = top.section("collate_conf").section("feature_extraction_conf")
    if "fbank_conf" in dataset or "feature_type" not in collate:
        fbank = dataset.section("fbank_conf")
        num_mel_bins = fbank.integer("num_mel_bins", 23)
    else:  # releases before 2021
        fbank = collate
        fbank.choice("feature_type", "fbank", ("fbank",))
        num_mel_bins = fbank.integer("mel_bins")
        fbank.fixed("using_pitch", default=False)
    frame_length, frame_shift = fbank.number("frame_length", 25.0), fbank.number("frame_shift", 10.0)
    fbank.fixed("window_type", default="povey")
    fbank.ignore("dither")
    fbank.finish()
    try:
        return FeatureConfig(
            sample_rate=sample_rate,
            num_mel_bins=num_mel_bins,
            frame_length_ms=frame_length,
            frame_shift_ms=frame_shift,
        )
    except ValueError as error:
        raise CheckpointError(f"{top.file}: dataset_conf: {error}") from error


def _normalization(top: Section) -> tuple[bool, str | None]:
    """Whether the file names statistics, and their file. Old files have `cmvn_file` at the top level and no `cmvn`."""
    conf = top.section("cmvn_conf")
    cmvn_file = conf.text("cmvn_file") or top.text("cmvn_file")
    conf.ignore("is_json_cmvn")
    conf.finish()
    top.ignore("is_json_cmvn")
    if "cmvn" in top:
        cmvn = top.text("cmvn")
        if cmvn is None:
            return False, None
        top.choice("cmvn", "global_cmvn", ("global_cmvn", "null"))
        return True, cmvn_file
    return cmvn_file is not None, cmvn_file


def _tokenizer(top: Section, vocab_size: int) -> tuple[Literal["char", "bpe"] | None, dict[str, int], str | None]:
    conf = top.section("tokenizer_conf")
    kind: Literal["char", "bpe"] | None = None
    if "tokenizer" in top:
        kinds: tuple[Literal["char", "bpe"], ...] = ("char", "bpe")
        kind = top.choice("tokenizer", "char", kinds)
    symbol_table = conf.text("symbol_table_path")
    if conf.value("connect_symbol") not in (None, ""):
        raise conf.unsupported("connect_symbol", conf.value("connect_symbol"), ("''",))
    # these change how transcripts become tokens, not how tokens become text
    conf.ignore("bpe_path", "non_lang_syms_path", "split_with_space", "is_multilingual", "num_languages")
    specials = conf.section("special_tokens")
    ids = {name: specials.integer(name, minimum=0) for name in SPECIAL_TOKENS if name in specials}
    for name, token in ids.items():
        if token >= vocab_size:
            raise specials.wrong(name, token, f"a token id below output_dim {vocab_size}")
    specials.finish()
    conf.finish()
    return kind, ids, symbol_table


def _blank(top: Section, vocab_size: int) -> int:
    conf = top.section("ctc_conf")
    blank = conf.integer("ctc_blank_id", 0, minimum=0)
    conf.finish()
    if blank >= vocab_size:
        raise conf.wrong("ctc_blank_id", blank, f"a token id below output_dim {vocab_size}")
    return blank


def _decoding(top: Section) -> DecodingConfig:
    conf = top.section("model_conf")
    ctc_weight = conf.number("ctc_weight", 0.5, minimum=0.0, maximum=1.0)
    reverse_weight = conf.number("reverse_weight", 0.0, minimum=0.0, maximum=1.0)
    conf.fixed("apply_non_blank_embedding", default=False)
    conf.ignore("lsm_weight", "length_normalized_loss", "ignore_id")
    conf.finish()
    return DecodingConfig(ctc_weight=ctc_weight, reverse_weight=reverse_weight)


def _norm(conf: Section) -> Norm:
    return Norm(kind=conf.choice("layer_norm_type", "layer_norm", LAYER_NORMS), eps=_eps(conf, "norm_eps"))


def _eps(conf: Section, key: str) -> float:
    return conf.number(key, 1e-5, minimum=0.0, maximum=1.0)


def _attention(conf: Section, dim: int, prefix: str = "", *, relative: bool = False) -> Attention:
    """Heads as configured; `prefix` chooses the biases of cross-attention."""
    num_heads = conf.integer("attention_heads", 4)
    head_dim = conf.optional_integer("head_dim")
    num_kv_heads = conf.optional_integer("n_kv_head")
    if num_kv_heads is not None and head_dim is None:
        raise conf.wrong("head_dim", None, "given together with n_kv_head")
    if head_dim is None and dim % num_heads:
        raise conf.wrong("attention_heads", num_heads, f"a divisor of the width {dim}, unless head_dim is given")
    head_dim = head_dim or dim // num_heads
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise conf.wrong("n_kv_head", num_kv_heads, f"a divisor of attention_heads {num_heads}")
    if relative and num_heads * head_dim != dim:
        raise conf.wrong("head_dim", head_dim, f"output_size {dim} / attention_heads {num_heads} for rel_selfattn")
    biases = {f"{name}_bias": conf.flag(f"{prefix}{name}_bias", default=True) for name in ("query", "key", "value")}
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, relative=relative, **biases)


def _feed_forward(conf: Section, activation: Activation) -> FeedForward:
    kind = FEED_FORWARDS[conf.choice("mlp_type", "position_wise_feed_forward", tuple(FEED_FORWARDS))]
    hidden, bias = conf.integer("linear_units", 2048), conf.flag("mlp_bias", default=True)
    num_experts, chosen = conf.integer("n_expert", 8), conf.integer("n_expert_activated", 2)
    if kind != "moe":
        return FeedForward(kind=kind, hidden=hidden, activation=activation, bias=bias)
    if chosen > num_experts:
        raise conf.wrong("n_expert_activated", chosen, f"at most n_expert {num_experts}")
    return FeedForward(
        kind=kind,
        hidden=hidden,
        activation=activation,
        bias=bias,
        num_experts=num_experts,
        num_experts_per_token=chosen,
    )


def _convolution(conf: Section, dim: int, activation: Activation) -> Convolution | None:
    used = conf.flag("use_cnn_module", default=True)
    kernel, causal = conf.integer("cnn_module_kernel", 15), conf.flag("causal", default=False)
    factor = conf.integer("conv_inner_factor", 2)
    norm = Norm(kind=conf.choice("cnn_module_norm", "batch_norm", CONVOLUTION_NORMS), eps=_eps(conf, "conv_norm_eps"))
    bias = conf.flag("conv_bias", default=True)
    if not used:
        return None
    if not causal and kernel % 2 == 0:
        raise conf.wrong("cnn_module_kernel", kernel, "odd for a convolution that is not causal")
    return Convolution(
        kernel=kernel, causal=causal, channels=factor * dim // 2, bias=bias, norm=norm, activation=activation
    )


def _encoder(top: Section, normalized: bool) -> Encoder:
    kinds: tuple[Literal["conformer", "transformer"], ...] = ("conformer", "transformer")
    kind = top.choice("encoder", "conformer", kinds)
    conformer = kind == "conformer"
    conf = top.section("encoder_conf")
    dim = conf.integer("output_size", 256)
    if dim % 2:
        raise conf.wrong("output_size", dim, "even: positions are pairs of sine and cosine")
    positions = conf.choice("pos_enc_layer_type", "rel_pos" if conformer else "abs_pos", ("rel_pos", "abs_pos"))
    attentions = ("rel_selfattn", "selfattn") if conformer else ("selfattn",)
    attention = conf.choice("selfattention_layer_type", attentions[0], attentions)
    activation = conf.choice("activation_type", "swish" if conformer else "relu", ACTIVATIONS)
    # negative sizes mean none, as in WeNet
    static_chunk = max(conf.integer("static_chunk_size", 0, minimum=-(1 << 31)), 0)
    encoder = Encoder(
        kind=kind,
        input_size=top.integer("input_dim"),
        dim=dim,
        num_blocks=conf.integer("num_blocks", 6),
        subsampling=conf.choice("input_layer", "conv2d", SUBSAMPLINGS),
        absolute_positions=positions == "abs_pos",
        attention=_attention(conf, dim, relative=attention == "rel_selfattn"),
        feed_forward=_feed_forward(conf, activation),
        macaron=conformer and conf.flag("macaron_style", default=True),
        convolution=_convolution(conf, dim, activation) if conformer else None,
        norm=_norm(conf),
        pre_norm=conf.flag("normalize_before", default=True),
        final_norm=not conformer or conf.flag("final_norm", default=True),
        static_chunk_size=static_chunk,
        dynamic_chunk=conf.flag("use_dynamic_chunk", default=False),
        normalized_input=normalized,
    )
    if conformer:
        conf.ignore("positionwise_conv_kernel_size")  # WeNet reads it and does not use it
    conf.ignore("dropout_rate", "positional_dropout_rate", "attention_dropout_rate")
    conf.ignore("use_dynamic_left_chunk", "gradient_checkpointing", "use_sdpa")
    conf.finish()
    if encoder.static_chunk_size and not encoder.dynamic_chunk and not encoder.streaming:
        # the convolution looks beyond the chunks of the mask: what WeNet computes, no streaming reproduces
        raise conf.unsupported("static_chunk_size", static_chunk, ("0 with causal: false", "any with causal: true"))
    return encoder


def _decoders(top: Section, vocab_size: int, dim: int) -> tuple[Decoder | None, Decoder | None, bool]:
    """Left and right decoder, and whether their output weights are tied to their embeddings."""
    conf = top.section("decoder_conf")
    if "decoder" in top and top.value("decoder") is None:
        return None, None, False
    kind = top.choice("decoder", "bitransformer", ("bitransformer", "transformer", "null"))
    uni = kind == "transformer"
    activation = conf.choice("activation_type", "relu", ACTIVATIONS)
    # "embed" and "abs_pos" are two names of the same class
    conf.choice("input_layer", "embed", ("embed", "abs_pos"))
    conf.fixed("use_output_layer", default=True)
    conf.fixed("src_attention", default=True)
    self_attention = _attention(conf, dim)
    # only the unidirectional decoder can be told about the biases of its cross-attention
    cross_attention = _attention(conf, dim, "src_") if uni else _without_bias_settings(self_attention)
    feed_forward, norm, pre_norm = (
        _feed_forward(conf, activation),
        _norm(conf),
        conf.flag("normalize_before", default=True),
    )

    def decoder(num_blocks: int) -> Decoder:
        return Decoder(
            vocab_size=vocab_size,
            dim=dim,
            num_blocks=num_blocks,
            self_attention=self_attention,
            cross_attention=cross_attention,
            feed_forward=feed_forward,
            norm=norm,
            pre_norm=pre_norm,
        )

    left = decoder(conf.integer("num_blocks", 6))
    right = None if uni else decoder(conf.integer("r_num_blocks", 0, minimum=0))
    tied = conf.flag("tie_word_embedding", default=False)
    conf.ignore("dropout_rate", "positional_dropout_rate", "self_attention_dropout_rate", "src_attention_dropout_rate")
    conf.ignore("gradient_checkpointing", "use_sdpa")
    conf.finish()
    return left, right, tied


def _without_bias_settings(attention: Attention) -> Attention:
    return Attention(num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads, head_dim=attention.head_dim)
