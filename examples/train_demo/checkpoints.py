"""Checkpoints of a run: exact ones, of which the last few are kept, and a compact one for the repository."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEPT = 5


def save(state: dict[str, Any], folder: Path, step: int) -> Path:
    """Writes `step_….pt`, whole or not at all, and removes what is older than the last `KEPT`."""
    path = folder / f"step_{step:07d}.pt"
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    for old in all_of(folder)[:-KEPT]:
        old.unlink()
    return path


def all_of(folder: Path) -> list[Path]:
    """The exact checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def load(path: Path) -> dict[str, Any]:
    """The state in an exact or a compact checkpoint."""
    state: dict[str, Any] = torch.load(path, map_location="cpu")
    return unpacked(state) if state.pop("compact", False) else state


def compact(state: dict[str, Any]) -> dict[str, Any]:
    """A state in a quarter of its size: the average in float16 stands for the masters too, momentum in 8 bits.

    A run that goes on from it does not take the very steps that it would have taken, but as good ones.
    """
    optimizer = state["optimizer"]
    weights = {name: weight.half() for name, weight in optimizer["average"].items()}
    parts = [
        part
        | {
            "state": {
                key: {name: _squeezed(name, value) for name, value in moments.items()}
                for key, moments in part["state"].items()
            }
        }
        for part in optimizer["parts"]
    ]
    return state | {"compact": True, "optimizer": {"average": weights, "parts": parts}}


def save_compact(state: dict[str, Any], path: Path) -> None:
    """Writes the compact form of a state."""
    torch.save(compact(state), path)


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `compact`, as far as there is one."""
    optimizer = state["optimizer"]
    average = {name: weight.float() for name, weight in optimizer["average"].items()}
    parts = [
        part
        | {
            "state": {
                key: {name: _restored(name, value) for name, value in moments.items()}
                for key, moments in part["state"].items()
            }
        }
        for part in optimizer["parts"]
    ]
    masters = {name: weight.clone() for name, weight in average.items()}
    return state | {"optimizer": {"masters": masters, "average": average, "parts": parts}}


def _squeezed(name: str, value: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    if name == "momentum":
        scale = value.abs().amax(tuple(range(1, value.ndim)), keepdim=True).clamp(min=1e-30) / 127
        return (value / scale).round().to(torch.int8), scale
    return value.sqrt().bfloat16() if name == "exp_avg_sq" else value.bfloat16() if name == "exp_avg" else value


def _restored(name: str, value: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    if isinstance(value, tuple):
        whole, scale = value
        return whole.float() * scale
    return value.float().square() if name == "exp_avg_sq" else value.float()
