"""Writes checkpoints of any size and kind in WeNet's layout, with seeded random weights, for tests and benchmarks.

The published U2++ MoE models (arXiv 2404.16407) have 225 million parameters without experts and a billion with them,
but their layer sizes are not public. The presets use sizes of our own. dense-225m has 223 million parameters. moe-1b is
the same network with 8 experts in place of each feed-forward layer, and has 1.06 billion parameters. dense-1b has no
experts, but as many parameters as moe-1b.

The same seed yields the same bytes. Values are uniform, with 24 random bits each, because uniform numbers are exact on
every processor. Normal numbers would depend on the processor's logarithm and cosine.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from u2moe.export.architecture import Architecture
from u2moe.export.attention import RMSNorm, positional_encoding
from u2moe.export.model import SpeechModel
from u2moe.export.positions import TABLE_LENGTHS, position_table
from u2moe.export.subsampling import KINDS as SUBSAMPLINGS
from u2moe.export.text_files import CMVN_ISTD, CMVN_MEAN, read_cmvn
from u2moe.export.training_config import parse_training_config
from u2moe.export.weights import expected_shapes

GAINS = {
    # wide logits: two implementations must choose the same experts, and the best token must vary
    "gate.weight": 3.0,
    "output_layer.weight": 3.0,
    "ctc_lo.weight": 3.0,
    # the ends of the residual branches: rounding errors must not grow through two dozen blocks
    "w_2.weight": 0.5,
    "self_attn.linear_out.weight": 0.25,  # attention averages over time, which would make all frames alike
    "src_attn.linear_out.weight": 0.5,
    "pointwise_conv2.weight": 0.5,
    "merge_proj.weight": 0.5,
}
"""Standard deviation of an output relative to its input, by the end of the weight's name; 1 for all other weights."""


def _sizes(dim: int, hidden: int, heads: int, *, blocks: int, decoder_blocks: tuple[int, int]) -> dict[str, Any]:
    return {
        "encoder_conf": {
            "output_size": dim, "linear_units": hidden, "attention_heads": heads, "num_blocks": blocks,
            "cnn_module_kernel": 15,
        },
        "decoder_conf": {
            "linear_units": hidden, "attention_heads": heads, "num_blocks": decoder_blocks[0],
            "r_num_blocks": decoder_blocks[1],
        },
    }  # fmt: skip


def _with_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    experts = {"mlp_type": "moe", "n_expert": 8, "n_expert_activated": 2}
    return {name: {**section, **experts} for name, section in config.items()}


_DENSE = _sizes(576, 1920, 8, blocks=24, decoder_blocks=(3, 3))
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_with_experts(_sizes(64, 96, 4, blocks=3, decoder_blocks=(2, 1))), "vocab_size": 60},
    "dense-225m": {**_DENSE, "vocab_size": 5000},
    "moe-1b": {**_with_experts(_DENSE), "vocab_size": 5000},
    "dense-1b": {**_sizes(1280, 4256, 16, blocks=24, decoder_blocks=(3, 3)), "vocab_size": 5000},
}
"""Arguments of `random_config`."""
ENCODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "conformer": {"cnn_module_kernel": 8, "causal": True, "cnn_module_norm": "layer_norm"},
    "e_branchformer": {"causal": True, "cgmlp_linear_units": 48, "cgmlp_conv_kernel": 7, "merge_conv_kernel": 3},
    "efficientConformer": {
        "cnn_module_kernel": 7, "causal": False, "cnn_module_norm": "layer_norm", "num_blocks": 4,
        "efficient_conf": {
            "stride_layer_idx": [1], "stride": [2], "group_layer_idx": [0, 1], "group_size": 3, "stride_kernel": True,
        },
    },
    "squeezeformer": {
        "encoder_dim": 32, "num_blocks": 4, "reduce_idx": 1, "recover_idx": 3, "feed_forward_expansion_factor": 2,
        "time_reduction_layer_type": "stream", "do_rel_shift": False, "cnn_module_kernel": 7, "causal": True,
        "cnn_norm_type": "layer_norm", "linear_units": None, "input_layer": None, "dropout_rate": None,
        "positional_dropout_rate": None,
    },
    "branchformer": {"causal": True, "cgmlp_linear_units": 48, "cgmlp_conv_kernel": 7, "linear_units": None},
}  # fmt: skip
"""Settings of encoder_conf that depend on the kind of encoder. None removes a key that this kind does not have."""


def random_config(
    *,
    encoder: str = "conformer",
    decoder: str | None = "bitransformer",
    encoder_conf: Mapping[str, Any] | None = None,
    decoder_conf: Mapping[str, Any] | None = None,
    vocab_size: int = 60,
    num_mel_bins: int = 80,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a train.yaml's content as WeNet's training writes it. By default, it describes a small causal U2++ model.

    `changes` sets top-level keys.
    """
    encoder_defaults: dict[str, Any] = {
        "output_size": 32, "attention_heads": 4, "linear_units": 48, "num_blocks": 2, "input_layer": "conv2d",
        "dropout_rate": 0.1, "positional_dropout_rate": 0.1, "attention_dropout_rate": 0.1,
        "use_dynamic_chunk": True, "use_dynamic_left_chunk": False,
    }  # fmt: skip
    encoder_defaults |= ENCODER_DEFAULTS.get(encoder, {})
    encoder_defaults = {key: value for key, value in encoder_defaults.items() if value is not None}
    decoder_defaults: dict[str, Any] = {
        "attention_heads": 4, "linear_units": 48, "num_blocks": 2, "dropout_rate": 0.1,
        "positional_dropout_rate": 0.1, "self_attention_dropout_rate": 0.1, "src_attention_dropout_rate": 0.1,
    }  # fmt: skip
    if decoder == "bitransformer":
        decoder_defaults["r_num_blocks"] = 1
    return {
        "model": "asr_model",
        "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1, "length_normalized_loss": False, "reverse_weight": 0.3},
        "encoder": encoder,
        "encoder_conf": {**encoder_defaults, **(encoder_conf or {})},
        "decoder": decoder,
        "decoder_conf": {**decoder_defaults, **(decoder_conf or {})},
        "ctc": "ctc",
        "ctc_conf": {"ctc_blank_id": 0},
        "cmvn": "global_cmvn",
        "cmvn_conf": {"cmvn_file": "data/train/global_cmvn", "is_json_cmvn": True},
        "tokenizer": "char",
        "tokenizer_conf": {
            "symbol_table_path": "data/dict/units.txt", "bpe_path": None, "non_lang_syms_path": None,
            "split_with_space": False, "is_multilingual": False, "num_languages": 1,
            "special_tokens": {"<blank>": 0, "<unk>": 1, "<sos>": 2, "<eos>": 2},
        },
        "dataset": "asr",
        "dataset_conf": {
            "fbank_conf": {"num_mel_bins": num_mel_bins, "frame_length": 25, "frame_shift": 10, "dither": 1.0},
            "resample_conf": {"resample_rate": 16000},
            "filter_conf": {"max_length": 40960, "min_length": 0, "token_max_length": 200, "token_min_length": 1},
            "batch_conf": {"batch_type": "static", "batch_size": 16},
        },
        "input_dim": num_mel_bins,
        "output_dim": vocab_size,
        "vocab_size": vocab_size,
        "dtype": "fp32",
        "model_dir": "exp/random",
        **(changes or {}),
    }  # fmt: skip


def old_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a train.yaml to the layout that WeNet wrote until the end of 2023; sos and eos become the last token."""
    newer = {"tokenizer", "tokenizer_conf", "ctc", "ctc_conf", "cmvn", "cmvn_conf", "model", "dataset"}
    newer |= {"vocab_size", "dtype"}
    kept = {key: value for key, value in config.items() if key not in newer}
    return {**kept, "cmvn_file": "data/train/global_cmvn", "is_json_cmvn": True, "lfmmi_dir": "", "raw_wav": True}


def num_parameters(config: Mapping[str, Any], *, active: bool = False) -> int:
    """Return a train.yaml's number of weights. If `active`, count only experts that a mixture activates for a token."""
    shapes = expected_shapes(parse_training_config(dict(config)).architecture)
    total = 0
    for name, shape in shapes.items():
        own = config["encoder_conf" if name.startswith("encoder.") else "decoder_conf"] if ".experts." in name else {}
        share = own.get("n_expert_activated", 1) / own.get("n_expert", 1) if active else 1
        total += round(math.prod(shape) * share)
    return total


def write_random_checkpoint(directory: Path, config: Mapping[str, Any], *, seed: int = 0) -> None:
    """Write train.yaml, units.txt, global_cmvn and final.pt into `directory`, which is created if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.yaml").write_text(yaml.dump(dict(config), allow_unicode=True), encoding="utf-8")
    architecture = parse_training_config(dict(config)).architecture
    symbols = random_vocabulary(architecture, bpe=config.get("tokenizer") == "bpe")
    lines = (f"{symbol} {token}\n" for token, symbol in enumerate(symbols))
    (directory / "units.txt").write_text("".join(lines), encoding="utf-8")
    state = random_state_dict(architecture, seed=seed)
    if architecture.encoder.normalized_input:
        size = architecture.encoder.input_size
        (directory / "global_cmvn").write_text(json.dumps(_statistics(size, seed)), encoding="utf-8")
        state[CMVN_MEAN], state[CMVN_ISTD] = read_cmvn(directory / "global_cmvn", size)
    torch.save(state, directory / "final.pt")


def random_vocabulary(architecture: Architecture, *, bpe: bool) -> list[str]:
    """Return one distinct symbol per token, with blank, sos and eos at the ids in `architecture`."""
    symbols: list[str] = []
    for token in range(architecture.vocab_size):
        if token == architecture.blank:
            symbols.append("<blank>")
        elif token in (architecture.sos, architecture.eos):
            own = "<sos>" if token == architecture.sos else "<eos>"
            symbols.append("<sos/eos>" if architecture.sos == architecture.eos else own)
        elif "<unk>" not in symbols:
            symbols.append("<unk>")
        else:
            piece = "abcdefghijklmnopqrstuvwxyz"[token % 26] + str(token)
            symbols.append(("\u2581" if token % 2 else "") + piece if bpe else chr(0x4E00 + token))
    return symbols


def random_state_dict(architecture: Architecture, *, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights, drawn one by one to save memory, and the tables and counters that WeNet stores."""
    with torch.device("meta"):
        network = SpeechModel(architecture)
    state = {name: draw() for name, (_, draw) in drawn_tensors(architecture, seed).items()}
    state |= {name: torch.tensor(1000) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    own = position_table(architecture.encoder, TABLE_LENGTHS.get(architecture.encoder.positions, 0))
    if own is not None:
        state[f"encoder.embed.{SUBSAMPLINGS[architecture.encoder.subsampling].POSITIONS}.pe"] = own
    table = positional_encoding(torch.arange(TABLE_LENGTHS["abs_pos"]), architecture.encoder.dim).unsqueeze(0)
    for part in ("left_decoder.", "right_decoder.", ""):
        if f"decoder.{part}embed.0.weight" in state:
            state.setdefault(f"decoder.{part}embed.1.pe", table)
    return state


def drawn_tensors(architecture: Architecture, seed: int) -> dict[str, tuple[torch.Size, Callable[[], Tensor]]]:
    """Return, by name, each tensor's shape and a function that draws its values. Batch norms' counters are omitted."""
    with torch.device("meta"):
        network = SpeechModel(architecture)
    unit_offset = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, RMSNorm)}
    return {
        name: (tensor.shape, partial(_tensor, name, tuple(tensor.shape), seed, around_zero=name in unit_offset))
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def random_statistics(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a random mean and a random inverse standard deviation for each of `size` features."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "global_cmvn"
        file.write_text(json.dumps(_statistics(size, seed)), encoding="utf-8")
        return read_cmvn(file, size)


def _uniform(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return numbers from -1 to 1 that depend only on the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.rand(shape, generator=generator).mul_(2).sub_(1)


def _tensor(name: str, shape: tuple[int, ...], seed: int, *, around_zero: bool) -> Tensor:
    """Return a random tensor, scaled so that the magnitude of activations stays about 1 from block to block."""
    values = _uniform(name, shape, seed)
    if name.endswith("running_var"):
        return values.mul_(0.5).add_(1)
    if name.endswith("ada_scale"):  # scale of a layer's input
        return values.mul_(0.3).add_(1)
    if name.endswith(".pe"):
        return values
    if len(shape) > 1 and not name.endswith(("pos_bias_u", "pos_bias_v", "ada_bias")):
        gain = next((gain for ending, gain in GAINS.items() if name.endswith(ending)), 1.0)
        if name.startswith("encoder.embed.") and shape[1] > 1:
            # opposite pairs cancel the mean of ReLU's outputs, which would hide the differences between frames
            pairs = values.view(shape[0], shape[1] // 2, 2, -1)
            pairs[:, :, 1] = -pairs[:, :, 0]
        return values.mul_(gain * math.sqrt(3 / math.prod(shape[1:])))
    if name.endswith(".weight"):  # normalisation
        return values.mul_(0.3).add_(0 if around_zero else 1)
    return values.mul_(0.5 if "pos_bias" in name else 0.1)


def _statistics(size: int, seed: int) -> dict[str, Any]:
    """Return random sums and sums of squares of 100,000 frames: means 8 to 14, standard deviations 2 to 4."""
    frames = 100_000
    means = (_uniform("mean", (size,), seed) * 3 + 11).tolist()
    deviations = (_uniform("deviation", (size,), seed) + 3).tolist()
    squares = [deviation**2 + mean**2 for mean, deviation in zip(means, deviations, strict=True)]
    sums = {"mean_stat": [mean * frames for mean in means], "var_stat": [square * frames for square in squares]}
    return {**sums, "frame_num": frames}
