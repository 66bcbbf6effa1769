"""Reads and strictly checks a WeNet checkpoint directory (train.yaml, final.pt, units.txt, global_cmvn)."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from u2moe.export.architecture import Architecture
from u2moe.export.encoders.kinds import KINDS
from u2moe.export.model import SpeechModel
from u2moe.export.positions import NUM_LEARNED
from u2moe.export.text_files import CMVN_ISTD, CMVN_MEAN, read_cmvn, read_text
from u2moe.export.training_config import CONFIG_FILE, TrainingConfig, read_training_config
from u2moe.export.weights import CONCATENATION, AdapterUse, linked_weights, load_weights, select_tensors
from u2moe.runtime.bundle.manifest import DecodingConfig, FeatureConfig, ModelConfig
from u2moe.runtime.errors import CheckpointError
from u2moe.runtime.text.vocabulary import TextConfig, parse_tokens

WEIGHTS_FILE = "final.pt"
VOCABULARY_FILES = ("units.txt", "lang_char.txt", "words.txt")
"""File names of the vocabulary, WeNet's newest name first. `words.txt` is last: it may belong to a language model."""
WORD_START = "\u2581"
BLANK, BOTH_ENDS = "<blank>", "<sos/eos>"
NOT_NORMALIZED = "train.yaml has cmvn: null, so WeNet ignores statistics"
UNTRAINED = "the decoder was not trained: model_conf.ctc_weight is 1"
OLD_EPS = 1e-12  # of layer normalisations outside convolution modules, until WeNet's commit 6d574b39 (January 2022)
POSITION_WEIGHT = "encoder.encoders.0.self_attn.linear_pos.weight"


@contextlib.contextmanager
def _file_system() -> Iterator[None]:
    """Turn errors of the file system, such as a directory without permission, into CheckpointErrors."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A WeNet checkpoint: the network's settings, tokens and weights."""

    path: Path
    """The directory of the checkpoint."""
    weights: Path
    """The file that the tensors were read from."""
    architecture: Architecture
    features: FeatureConfig
    text: TextConfig
    tokens: list[str]
    """Symbols by id. If each token is a word, symbols begin with U+2581, like BPE pieces that begin words."""
    decoding: DecodingConfig
    tensors: dict[str, Tensor]
    """The tensors that the network uses, by WeNet's names, in float32; memory-mapped if the file stores float32."""
    ignored: dict[str, str]
    """For each unused tensor of the file, by name: the reason why it is not used."""

    @classmethod
    @_file_system()
    def open(
        cls,
        directory: str | PathLike[str],
        weights: str | PathLike[str] | None = None,
        units: str | PathLike[str] | None = None,
        lora: AdapterUse | None = None,
    ) -> Checkpoint:
        """Read a directory in WeNet's layout.

        It has a train.yaml, or a yaml file named after the weights, such as epoch_9.yaml. For the other arguments, see
        `exporter.export_bundle`.

        Raises:
            CheckpointError: a file is missing or damaged, or does not match the others.
            UnsupportedError: this kind of checkpoint is not supported.
        """
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(f"{path}: is not a directory; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}")
        weights_path = linked_weights(_chosen(path, weights or WEIGHTS_FILE))
        config_path = path / CONFIG_FILE
        if not config_path.exists():  # the weights may have a file of their own: beside them, or beside a link's target
            named = (file.with_suffix(".yaml") for file in (weights_path, Path(os.path.realpath(weights_path))))
            config_path = next(filter(Path.is_file, named), config_path)
        config = read_training_config(config_path)
        tokens = read_vocabulary(_chosen(path, units) if units else _vocabulary_path(path, config), config)
        state, contained = load_weights(weights_path, config.adapters, lora)
        if config.without_cmvn:
            contained |= {name: NOT_NORMALIZED for name in (CMVN_MEAN, CMVN_ISTD) if state.pop(name, None) is not None}
        # if the state dict uses other names, `select_tensors` reports a clearer error than "has no statistics"
        if any(name.startswith("encoder.") for name in state):
            state.update(_statistics(weights_path, state, path, config))
        architecture = as_trained(weights_path, config, state)
        blank = tokens.index(BLANK) if config.blank is None and BLANK in tokens else architecture.blank
        encoder = replace(architecture.encoder, normalized_input=CMVN_MEAN in state)
        architecture = replace(architecture, encoder=encoder, blank=blank)
        untrained = {} if config.trained_decoder else {name: UNTRAINED for name in state if name.startswith("decoder.")}
        trained = {name: tensor for name, tensor in state.items() if name not in untrained}
        tensors, ignored = select_tensors(weights_path, trained, architecture, tied_embedding=config.tied_embedding)
        text = _text_config(path, config, tokens)
        if config.separate:
            silent = {architecture.blank, architecture.sos, architecture.eos}
            tokens = [token if index in silent else WORD_START + token for index, token in enumerate(tokens)]
        return cls(
            path=path, weights=weights_path, architecture=architecture, features=config.features, text=text,
            tokens=tokens, decoding=config.decoding, tensors=tensors, ignored={**ignored, **untrained, **contained},
        )  # fmt: skip

    def network(self) -> SpeechModel:
        """Return the network in evaluation mode; it shares the memory of `tensors`."""
        with torch.device("meta"):
            network = SpeechModel(self.architecture)
        # `tensors` lacks the counters of batch normalisation
        buffers = {name: torch.zeros_like(buffer, device="cpu") for name, buffer in network.named_buffers()}
        network.load_state_dict(buffers | self.tensors, assign=True)
        return network.requires_grad_(requires_grad=False).eval()

    def model_config(self) -> ModelConfig:
        """Return the description of the model for the bundle's manifest."""
        encoder = self.architecture.encoder
        block, reduction = KINDS[encoder.kind].block, encoder.frame_reduction
        left, right = self.architecture.left_decoder, self.architecture.right_decoder
        return ModelConfig(
            streaming=encoder.streaming, feature_size=encoder.input_size, output_size=encoder.dim,
            decoder="none" if left is None else "transformer" if right is None else "bitransformer",
            num_blocks=encoder.num_blocks, vocab_size=self.architecture.vocab_size,
            subsampling_rate=encoder.subsampling_rate, right_context=encoder.right_context,
            caches=block.caches(encoder) if encoder.streaming else (), chunk_multiple=encoder.chunk_multiple,
            max_position=(NUM_LEARNED if encoder.learned_positions else ModelConfig.max_position) // reduction,
            static_chunk_size=0 if encoder.dynamic_chunk else encoder.static_chunk_size // reduction,
            frame_reduction=reduction, blank=self.architecture.blank, sos=self.architecture.sos,
            eos=self.architecture.eos,
        )  # fmt: skip


def _chosen(directory: Path, name: str | PathLike[str]) -> Path:
    """Return the path of a file that the user named. A file of this name in `directory` has priority."""
    inside, elsewhere = directory / name, Path(name)
    is_path = os.path.lexists(elsewhere) or elsewhere.parent != Path()
    return elsewhere if is_path and not os.path.lexists(inside) else inside


def _vocabulary_path(directory: Path, config: TrainingConfig) -> Path:
    """Return the vocabulary file in `directory`: the one that train.yaml names, or one of `VOCABULARY_FILES`."""
    named = [re.split(r"[\\/]", config.symbol_table)[-1]] if config.symbol_table else []
    candidates = list(dict.fromkeys([*named, *VOCABULARY_FILES]))
    for name in candidates:
        if os.path.isfile(directory / name):  # noqa: PTH113 - Path.is_file() raises for names that are too long
            return directory / name
    kept = f" (the recipe keeps it at {config.symbol_table})" if config.symbol_table else ""
    raise CheckpointError(
        f"{directory}: has no vocabulary; expected one of {', '.join(candidates)}: copy it to this directory, "
        f"or name it with --units{kept}"
    )


def read_vocabulary(path: Path, config: TrainingConfig) -> list[str]:
    """Return the symbols by id. The file has one "symbol id" per line, in any order."""
    vocab_size = config.architecture.vocab_size
    tokens = parse_tokens(read_text(path, purpose="it contains the vocabulary"), file=str(path), error=CheckpointError)
    if len(tokens) != vocab_size:
        expected = f"{vocab_size}, the output_dim in {CONFIG_FILE}"
        raise CheckpointError(f"{path}: has {len(tokens)} symbols, expected {expected}")
    symbol, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise CheckpointError(f"{path}: has the symbol {symbol!r} more than once")
    ids, stated = {symbol: token for token, symbol in enumerate(tokens)}, dict(config.special_tokens)
    if config.blank is not None:
        stated[BLANK] = config.blank
    for symbol, token in stated.items():
        if ids.get(symbol, token) != token:
            raise CheckpointError(f"{path}: {symbol} has id {ids[symbol]}, expected {token} as in {CONFIG_FILE}")
    ends = {stated[symbol] for symbol in ("<sos>", "<eos>") if symbol in stated}
    if ends and ids.get(BOTH_ENDS) not in {*ends, None}:
        expected = f"{' or '.join(map(str, sorted(ends)))} as for <sos> and <eos> in {CONFIG_FILE}"
        raise CheckpointError(f"{path}: {BOTH_ENDS} has id {ids[BOTH_ENDS]}, expected {expected}")
    return tokens


def _text_config(directory: Path, config: TrainingConfig, tokens: list[str]) -> TextConfig:
    """Return the tokenizer and the id of `<unk>`."""
    # an old train.yaml does not name the tokenizer: a sentencepiece model or marks where words start show BPE
    pieces = any(len(token) > 1 and token.startswith(WORD_START) for token in tokens)
    known = "bpe" if config.separate else config.tokenizer
    kind = known or ("bpe" if pieces or any(directory.glob("*.model")) else "char")
    unk = tokens.index("<unk>") if "<unk>" in tokens else config.special_tokens.get("<unk>")
    return TextConfig(tokenizer=kind, unk=unk)


def _statistics(
    weights: Path, state: Mapping[str, Tensor], directory: Path, config: TrainingConfig
) -> dict[str, Tensor]:
    """Return the feature statistics from their file; empty if the state dict has them, or if training used none."""
    found, encoder = [name for name in (CMVN_MEAN, CMVN_ISTD) if name in state], config.architecture.encoder
    if len(found) == 1:
        told = f"has only {found[0]}; it must have both {CMVN_MEAN} and {CMVN_ISTD}, or neither"
        raise CheckpointError(f"{weights}: {told}")
    if found or not encoder.normalized_input:
        return {}
    name = re.split(r"[\\/]", config.cmvn_file)[-1] if config.cmvn_file else "global_cmvn"
    return dict(zip((CMVN_MEAN, CMVN_ISTD), read_cmvn(directory / name, encoder.input_size), strict=True))


def as_trained(path: Path, config: TrainingConfig, state: Mapping[str, Tensor]) -> Architecture:
    """Return the architecture as built by the WeNet release that wrote this train.yaml and state dict.

    Until 2023 a conformer's `selfattention_layer_type` had no effect. Attention was relative with `rel_pos` (until
    2022, also with `abs_pos`); otherwise it was plain. If two releases with different epsilons could have written the
    files, the error is a CheckpointError.
    """
    architecture, encoder = config.architecture, config.architecture.encoder
    if config.layout == "present" or encoder.kind not in ("conformer", "transformer"):  # other kinds came later
        return architecture
    if encoder.kind == "conformer" and (POSITION_WEIGHT in state or encoder.positions != "rel_pos"):
        encoder = replace(encoder, attention=replace(encoder.attention, relative=POSITION_WEIGHT in state))
    decoders = [architecture.left_decoder, architecture.right_decoder]
    unstated = {"encoder_conf", *(["decoder_conf"] if any(decoders) else [])} - config.stated_eps
    if config.layout == "dataset_conf":
        if unstated and any(CONCATENATION.fullmatch(name) for name in state):
            raise CheckpointError(
                f"{path}: the eps of its layer normalisations is unknown: the file was written between September "
                f"2021 and May 2022. WeNet used {OLD_EPS:g} until January 2022 (commit 6d574b39) and 1e-05 since. Add "
                f"norm_eps: 1.0e-12 or norm_eps: 1.0e-5 to {' and '.join(sorted(unstated))} of train.yaml"
            )
        unstated = set()
    if "encoder_conf" in unstated:
        encoder = replace(encoder, norm=replace(encoder.norm, eps=OLD_EPS))
    if "decoder_conf" in unstated:
        decoders = [own and replace(own, norm=replace(own.norm, eps=OLD_EPS)) for own in decoders]
    left, right = decoders
    encoder = replace(encoder, embed_eps=encoder.norm.eps)
    return replace(architecture, encoder=encoder, left_decoder=left, right_decoder=right)
