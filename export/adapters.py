"""Low-rank adapters of WeNet's fine-tuning (LoRA, arXiv 2106.09685), merged into the weights that they adapt."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from u2moe.runtime.errors import CheckpointError

AdapterUse = Literal["add", "contained"]
"""add: add the adapters, because the weights in the file do not include them. contained: the weights include them."""
DOWN, UP = ".lora_A", ".lora_B"
CONTAINED = "an adapter that its weight already contains"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The settings in `lora_conf` of train.yaml. An adapted weight is weight + alpha / rank * up @ down."""

    rank: int
    alpha: float


def with_adapters(
    path: Path, state: Mapping[str, Tensor], adapters: Adapters | None, use: AdapterUse | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Merge the adapters into the weights. Return the tensors and the reasons for ignoring other tensors, both by name.

    After an epoch, WeNet saves weights that include the adapters. Within an epoch, it saves weights without them. The
    file name shows which kind of file it is; `use` overrides the file name.

    Raises:
        CheckpointError: it is unknown whether the weights contain the adapters, or an adapter does not fit its weight.
    """
    names = sorted(name.removesuffix(DOWN) for name in state if name.endswith(DOWN))
    if adapters is None or not names:
        return dict(state), {}
    if use is None:
        if re.fullmatch(r"epoch_\d+\.pt", path.resolve().name):
            use = "contained"
        elif re.fullmatch(r"(step_\d+|init|lora_init)\.pt", path.resolve().name):
            use = "add"
        else:
            raise CheckpointError(
                f"{path}: has LoRA adapters: use --lora contained if the weights already include them (as in "
                "epoch_N.pt), or --lora add if not (as in step_N.pt)"
            )
    rest = {name: tensor for name, tensor in state.items() if not name.endswith((DOWN, UP))}
    if use == "contained":
        return rest, dict.fromkeys(state.keys() - rest.keys(), CONTAINED)
    return rest | {f"{name}.weight": _adapted(path, state, name, adapters) for name in names}, {}


def _adapted(path: Path, state: Mapping[str, Tensor], name: str, adapters: Adapters) -> Tensor:
    """Return one layer's weight in float32, with the adapter added."""
    parts = [state.get(name + ending) for ending in (".weight", UP, DOWN)]
    shapes = [None if part is None else tuple(part.shape) for part in parts]
    weight, up, down = parts
    if weight is None or up is None or down is None or weight.ndim != 2:
        told = f"weight, {UP[1:]} and {DOWN[1:]} have shapes {shapes}, expected matrices"
        raise CheckpointError(f"{path}: {name}: {told}")
    rank = adapters.rank
    expected = [(weight.shape[0], rank), (rank, weight.shape[1])]
    if shapes[1:] != expected:
        told = f"have shapes {shapes[1:]}, but lora_rank {rank} requires {expected}"
        raise CheckpointError(f"{path}: {name}{UP} and {DOWN} {told}")
    return (weight.double() + up.double() @ down.double() * (adapters.alpha / rank)).float()
