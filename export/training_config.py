"""train.yaml, in WeNet's old and new layouts, to the architecture, features and vocabulary. Reads no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from u2moe.export.architecture import Architecture
from u2moe.export.network_config import read_decoders, read_encoder
from u2moe.export.text_files import read_yaml
from u2moe.export.wenet_keys import ONE_VALUE, WITHOUT_EFFECT
from u2moe.export.yaml_section import Section
from u2moe.runtime.errors import CheckpointError
from u2moe.runtime.manifest import DecodingConfig, FeatureConfig

CONFIG_FILE = "train.yaml"
SPECIAL_TOKENS = ("<blank>", "<unk>", "<sos>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The content of train.yaml; features are normalised (`Encoder.normalized_input`) if it names statistics."""

    architecture: Architecture
    features: FeatureConfig
    decoding: DecodingConfig
    tokenizer: Literal["char", "bpe"] | None
    """None in old files, which do not state it."""
    special_tokens: dict[str, int]
    """Ids by symbol, empty in old files."""
    symbol_table: str | None
    """File name of the vocabulary."""
    cmvn_file: str | None
    """File name of the feature statistics; None if trained without them, or if the file is not named."""
    tied_embedding: bool
    """The decoders' output weights are their embeddings, whatever the state dict holds."""


def read_training_config(path: Path) -> TrainingConfig:
    """Read and check a train.yaml; every key is either used, known to be irrelevant, or refused by name."""
    return parse_training_config(read_yaml(path, purpose="it says what the network is"), path.name)


def parse_training_config(values: object, file: str = CONFIG_FILE) -> TrainingConfig:
    """Like `read_training_config`, for a mapping that is already loaded."""
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
    encoder = read_encoder(top, normalized=normalized)
    left, right, tied = read_decoders(top, vocab_size, encoder.dim)
    blank = _token(top.section("ctc_conf"), "ctc_blank_id", vocab_size, default=0)
    decoding = _decoding(top)
    top.finish(WITHOUT_EFFECT, ONE_VALUE)
    return TrainingConfig(
        architecture=Architecture(
            encoder=encoder,
            left_decoder=left,
            right_decoder=right,
            vocab_size=vocab_size,
            sos=special_tokens.get("<sos>", vocab_size - 1),
            eos=special_tokens.get("<eos>", vocab_size - 1),
            blank=blank,
        ),
        features=features,
        decoding=decoding,
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        symbol_table=symbol_table,
        cmvn_file=cmvn_file,
        tied_embedding=tied,
    )


def _features(top: Section) -> FeatureConfig:
    dataset, collate = top.section("dataset_conf", is_whole=False), top.section("collate_conf", is_whole=False)
    dataset.choice("feats_type", "fbank", ("fbank",))
    sample_rate = dataset.section("resample_conf", is_whole=False).integer("resample_rate", 16000)
    old = collate.section("feature_extraction_conf", is_whole=False)
    if "fbank_conf" in dataset or "feature_type" not in old:
        fbank = dataset.section("fbank_conf")
        num_mel_bins = fbank.integer("num_mel_bins", 23)
    else:  # releases before 2021
        fbank = collate.section("feature_extraction_conf")
        fbank.choice("feature_type", "fbank", ("fbank",))
        num_mel_bins = fbank.integer("mel_bins")
    frame_length, frame_shift = fbank.number("frame_length", 25.0), fbank.number("frame_shift", 10.0)
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
    specials = conf.section("special_tokens")
    ids = {name: _token(specials, name, vocab_size) for name in SPECIAL_TOKENS if name in specials}
    return kind, ids, symbol_table


def _token(conf: Section, key: str, vocab_size: int, default: int | None = None) -> int:
    token = conf.integer(key, default, minimum=0)
    if token >= vocab_size:
        raise conf.wrong(key, token, f"a token id below output_dim {vocab_size}")
    return token


def _decoding(top: Section) -> DecodingConfig:
    conf = top.section("model_conf")
    ctc_weight = conf.number("ctc_weight", 0.5, minimum=0.0, maximum=1.0)
    reverse_weight = conf.number("reverse_weight", 0.0, minimum=0.0, maximum=1.0)
    return DecodingConfig(ctc_weight=ctc_weight, reverse_weight=reverse_weight)
