"""Checkpoints of a run: exact ones, of which the last few are kept, and a compact one for the repository."""

from pathlib import Path
from typing import Any

import torch

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
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state["options"].pop("router_noise", None)  # what runs had before, and dense ones made no use of
    return unpacked(state) if state.pop("compact", False) else state


def finished_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The weights that make a finished model: at the end of a decay they themselves, else their average."""
    decayed = state["options"]["decay_from"] is not None
    weights: dict[str, Any] = state["optimizer"]["masters" if decayed else "average"]
    return weights


def compact(state: dict[str, Any]) -> dict[str, Any]:
    """A state in a sixth of its size: the averaged weights in float16, at the beginning of the next epoch.

    The moments of the optimizer are left out: they reach back 20 to 50 steps and are soon there again.
    """
    weights = {name: weight.half() for name, weight in state["optimizer"]["average"].items()}
    progress = state["progress"]
    progress = progress | {"epoch": progress["epoch"] + 1, "position": 0, "sizes": {}}
    return state | {"compact": True, "optimizer": {"average": weights}, "progress": progress}


def save_compact(state: dict[str, Any], path: Path) -> None:
    """Writes the compact form of a state."""
    torch.save(compact(state), path)


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """A state to go on from, out of a compact one."""
    average = {name: weight.float() for name, weight in state["optimizer"]["average"].items()}
    masters = {name: weight.clone() for name, weight in average.items()}
    return state | {"optimizer": {"masters": masters, "average": average, "parts": None}}
