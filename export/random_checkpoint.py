"""Makes networks of any size and kind with seeded random weights, as checkpoints in WeNet's layout or as bundles.

Checkpoints are for tests and benchmarks. Bundles need just a train.yaml, and measure a network's cost before training.
Their tensors are drawn again for each use and never kept, so even a billion parameters need little memory. The same
seed yields the same bytes. Values are uniform, with 24 random bits each, because uniform numbers are exact on every
processor. Normal numbers would depend on the processor's logarithm and cosine.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
import yaml
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from u2moe.export.architecture import Architecture
from u2moe.export.attention import RMSNorm, positional_encoding
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.model import SpeechModel
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.positions import TABLE_LENGTHS, position_table
from u2moe.export.subsampling import KINDS as SUBSAMPLINGS
from u2moe.export.text_files import CMVN_ISTD, CMVN_MEAN, Section, read_cmvn, read_yaml
from u2moe.export.training_config import CONFIG_FILE, parse_training_config, read_features
from u2moe.export.weights import expected_shapes
from u2moe.runtime.errors import CheckpointError
from u2moe.runtime.text.vocabulary import TextConfig
from u2moe.runtime.validation import refused_as

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


VOCAB_SIZE = 5000  # vocabulary size if train.yaml does not state one, as in a recipe before training
_NUM_FRAMES, _NUM_TOKENS = 600, 40  # numbers of feature frames and of tokens with which routers are adjusted


def _sizes(dim: int, hidden: int, heads: int, *, blocks: int, decoder_blocks: tuple[int, int]) -> dict[str, Any]:
    shared = {"linear_units": hidden, "attention_heads": heads}
    return {
        "encoder_conf": {"output_size": dim, **shared, "num_blocks": blocks, "cnn_module_kernel": 15},
        "decoder_conf": {**shared, "num_blocks": decoder_blocks[0], "r_num_blocks": decoder_blocks[1]},
    }


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
"""Arguments of `random_config`. The layer sizes of the published U2++ MoE models (arXiv 2404.16407) are not public, so
these are our own. moe-1b is dense-225m with 8 experts for each feed-forward layer; dense-1b has as many parameters."""
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
    """Return a train.yaml as WeNet writes it, by default of a small causal U2++ model. `changes` are top-level keys."""
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
        **({"r_num_blocks": 1} if decoder == "bitransformer" else {}),
    }  # fmt: skip
    return {
        "model": "asr_model",
        "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1, "length_normalized_loss": False, "reverse_weight": 0.3},
        "encoder": encoder, "encoder_conf": {**encoder_defaults, **(encoder_conf or {})},
        "decoder": decoder, "decoder_conf": {**decoder_defaults, **(decoder_conf or {})},
        "ctc": "ctc", "ctc_conf": {"ctc_blank_id": 0},
        "cmvn": "global_cmvn", "cmvn_conf": {"cmvn_file": "data/train/global_cmvn", "is_json_cmvn": True},
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
        "input_dim": num_mel_bins, "output_dim": vocab_size, "vocab_size": vocab_size, "dtype": "fp32",
        "model_dir": "exp/random", **(changes or {}),
    }  # fmt: skip


def old_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a train.yaml to the layout that WeNet wrote until the end of 2023; sos and eos become the last token."""
    newer = {"tokenizer", "tokenizer_conf", "ctc", "ctc_conf", "cmvn", "cmvn_conf", "model", "dataset"}
    kept = {key: value for key, value in config.items() if key not in newer | {"vocab_size", "dtype"}}
    return {**kept, "cmvn_file": "data/train/global_cmvn", "is_json_cmvn": True, "lfmmi_dir": "", "raw_wav": True}


def num_parameters(config: Mapping[str, Any], *, active: bool = False) -> int:
    """Return a train.yaml's number of weights. If `active`, count only experts that a mixture activates for a token."""
    total = 0
    for name, shape in expected_shapes(parse_training_config(dict(config)).architecture).items():
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
        state |= _write_statistics(directory, architecture.encoder.input_size, seed)
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
            values[:, 1::2] = -values[:, : shape[1] // 2 * 2 : 2]
        return values.mul_(gain * math.sqrt(3 / math.prod(shape[1:])))
    if name.endswith(".weight"):  # normalisation
        return values.mul_(0.3).add_(0 if around_zero else 1)
    return values.mul_(0.5 if "pos_bias" in name else 0.1)


def _write_statistics(folder: Path, size: int, seed: int) -> dict[str, Tensor]:
    """Write a global_cmvn of 100,000 frames: means 8 to 14, standard deviations 2 to 4. Return its tensors by name."""
    file, frames = folder / "global_cmvn", 100_000
    means = (_uniform("mean", (size,), seed) * 3 + 11).tolist()
    deviations = (_uniform("deviation", (size,), seed) + 3).tolist()
    squares = [deviation**2 + mean**2 for mean, deviation in zip(means, deviations, strict=True)]
    sums = {"mean_stat": [mean * frames for mean in means], "var_stat": [square * frames for square in squares]}
    file.write_text(json.dumps({**sums, "frame_num": frames}), encoding="utf-8")
    return dict(zip((CMVN_MEAN, CMVN_ISTD), read_cmvn(file, size), strict=True))


class DrawnTensor(Tensor):
    """A float32 tensor that stores no values: each operation that uses it draws the same random values again."""

    draw: Callable[[], Tensor]

    @classmethod
    def of(cls, draw: Callable[[], Tensor], shape: torch.Size) -> Self:
        """Return a tensor with the values that `draw` returns. `draw` must return the same values each time."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # noqa: SLF001 - as torch documents it
        made.draw = draw
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stubs describe a method of an instance
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Draw the values, and run the operation on them. Detaching draws no values."""
        if func is torch.ops.aten.detach.default:
            return cls.of(args[0].draw, args[0].shape)
        drawn_args, drawn_kwargs = tree_map_only(cls, lambda each: each.draw(), (args, dict(kwargs or {})))
        return func(*drawn_args, **drawn_kwargs)

    def __deepcopy__(self, _memo: object) -> Self:
        """Return another reference to the same values, which never change."""
        return self.of(self.draw, self.shape)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values."""
        return self.draw().numpy(force=force)


def random_source(config_file: str | os.PathLike[str], *, vocab_size: int | None = None, seed: int = 0) -> Checkpoint:
    """Return a `Checkpoint` with random weights; for the arguments and errors, see `exporter.export_random`."""
    path = Path(config_file)
    path = path / CONFIG_FILE if path.is_dir() else path
    values = read_yaml(path, purpose="it describes the network")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is not a mapping, expected the keys of a train.yaml")
    stated = values.get("output_dim", values.get("vocab_size"))
    if None not in (stated, vocab_size) and stated != vocab_size:
        raise CheckpointError(f"{path}: output_dim is {stated!r}, which contradicts --vocab-size {vocab_size}")
    size = vocab_size or stated or VOCAB_SIZE
    with refused_as(CheckpointError, path.name):
        features = read_features(Section(path.name, values))
    values = {"input_dim": features.size, **values, "output_dim": size, "vocab_size": size}  # as training would add
    config = parse_training_config(values, path.name)
    architecture, kind = config.architecture, config.tokenizer or "char"
    drawn = drawn_tensors(architecture, seed).items()
    tensors: dict[str, Tensor] = {name: DrawnTensor.of(draw, shape) for name, (shape, draw) in drawn}
    if architecture.encoder.normalized_input:
        with tempfile.TemporaryDirectory() as folder:
            tensors |= _write_statistics(Path(folder), architecture.encoder.input_size, seed)
    tokens = random_vocabulary(architecture, bpe=kind == "bpe")
    text = TextConfig(tokenizer=kind, unk=tokens.index("<unk>"))
    return Checkpoint(
        path=path.parent, weights=path, architecture=architecture, features=config.features, text=text, tokens=tokens,
        decoding=config.decoding, tensors=tensors, ignored={},
    )  # fmt: skip


def spread_routers(network: SpeechModel, seed: int = 0) -> None:
    """Adjust random routers so that they spread tokens evenly: the worst case, because most experts' weights are read.

    Random routers favour some experts because the mean of all tokens is not zero. Removing the direction of that mean
    from a router's weights spreads the tokens.
    """

    def turn(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gate = cast("MixtureOfExperts", layer).gate
        mean = inputs[0].reshape(-1, inputs[0].shape[-1]).mean(dim=0)
        weight = gate.weight - torch.outer(gate.weight @ mean, mean) / (mean @ mean)
        gate.weight = nn.Parameter(weight, requires_grad=False)

    layers = [layer for layer in network.modules() if isinstance(layer, MixtureOfExperts)]
    if not layers:
        return
    handles = [layer.register_forward_pre_hook(turn) for layer in layers]
    config, generator = network.config, torch.Generator().manual_seed(seed)
    features = torch.randn(1, _NUM_FRAMES, config.encoder.input_size, generator=generator).mul_(3).add_(11)
    with torch.no_grad():
        output, _ = network.encoder(features, torch.tensor([_NUM_FRAMES]))
        if network.decoder is not None:
            tokens = torch.randint(config.vocab_size, (1, _NUM_TOKENS), generator=generator)
            network.score(tokens, torch.tensor([_NUM_TOKENS]), output, torch.tensor([output.shape[1]]))
    for handle in handles:
        handle.remove()
