"""Builds bundles from just a train.yaml, with seeded random weights, to measure a network's cost before training.

A tensor's values are drawn again for each use and never kept, so even a billion parameters need little memory.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from u2moe.export.checkpoint import Checkpoint
from u2moe.export.model import SpeechModel
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.random_checkpoint import drawn_tensors, random_statistics, random_vocabulary
from u2moe.export.text_files import CMVN_ISTD, CMVN_MEAN, read_yaml
from u2moe.export.training_config import CONFIG_FILE, parse_training_config, read_features
from u2moe.export.yaml_section import Section
from u2moe.runtime.errors import CheckpointError
from u2moe.runtime.text.vocabulary import TextConfig
from u2moe.runtime.validation import refused_as

VOCAB_SIZE = 5000
"""Vocabulary size if train.yaml does not state one, as in a recipe before training."""
_NUM_FRAMES, _NUM_TOKENS = 600, 40
"""Numbers of feature frames and of tokens with which routers are adjusted."""


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
    """Return a `Checkpoint` with random weights for the network that a train.yaml describes.

    Args:
        config_file: a train.yaml (from a recipe or from training), or its folder.
        vocab_size: number of tokens; None: as in the file, or 5000 if it states none.
        seed: the same seed yields the same weights.

    Raises:
        CheckpointError: the file is missing or damaged, or contradicts itself or `vocab_size`.
        UnsupportedError: this kind of network is not supported.
    """
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
    architecture = config.architecture
    drawn = drawn_tensors(architecture, seed).items()
    tensors: dict[str, Tensor] = {name: DrawnTensor.of(draw, shape) for name, (shape, draw) in drawn}
    if architecture.encoder.normalized_input:
        tensors[CMVN_MEAN], tensors[CMVN_ISTD] = random_statistics(architecture.encoder.input_size, seed)
    is_bpe = config.tokenizer == "bpe"
    tokens = random_vocabulary(architecture, bpe=is_bpe)
    return Checkpoint(
        path=path.parent,
        weights=path,
        architecture=architecture,
        features=config.features,
        text=TextConfig(tokenizer="bpe" if is_bpe else "char", unk=tokens.index("<unk>")),
        tokens=tokens,
        decoding=config.decoding,
        tensors=tensors,
        ignored={},
    )


def spread_routers(network: SpeechModel, seed: int = 0) -> None:
    """Adjust random routers so that they spread tokens evenly over their experts.

    An even spread is the worst case, because the weights of as many experts as possible are read. Random routers favour
    some experts because the mean of all tokens is not zero. Removing the direction of that mean from a router's weights
    spreads the tokens.
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
