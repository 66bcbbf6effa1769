"""Checkpoints of a run: exact checkpoints (the last few are kept), and a compact checkpoint for the repository."""

import io
import lzma
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

KEPT = 5
WEIGHTS, PIECES = "final.pt", "bpe.model"
TWO_BYTES = {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}
"""Filter for xz that separates the two bytes of float16 numbers. xz then saves a sixth instead of a tenth."""
STATISTICS = "encoder.global_cmvn."


def save(state: dict[str, Any], folder: Path, step: int) -> Path:
    """Write `step_….pt` atomically, and remove all but the last `KEPT` checkpoints."""
    path = folder / f"step_{step:07d}.pt"
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    for old in all_of(folder)[:-KEPT]:
        old.unlink()
    return path


def all_of(folder: Path) -> list[Path]:
    """Return the exact checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def load(path: Path, model: Path | None = None) -> dict[str, Any]:
    """Return the state in an exact or compact checkpoint.

    If the checkpoint was made without weights, `model` is the WeNet directory that has them.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state["options"].pop("router_noise", None)  # an option of earlier runs that dense runs did not use
    if digest := state.pop("weights_of", None):
        if model is None or digest != digest_of(model):
            raise ValueError(f"{path}: its weights are in another file: the final.pt with SHA-256 {digest}")
        state["optimizer"]["average"] |= weights_of(model)
    return unpacked(state) if state.pop("compact", False) else state


def weights_of(model: Path) -> dict[str, Any]:
    """Return the weights in a WeNet directory, without the statistics of the features."""
    weights = torch.load(io.BytesIO(content(model / WEIGHTS)), map_location="cpu", weights_only=True)
    return {name: weight for name, weight in weights.items() if not name.startswith(STATISTICS)}


def digest_of(model: Path) -> str:
    """Return a digest that identifies the weights in a WeNet directory."""
    return sha256(content(model / WEIGHTS)).hexdigest()


def pack(model: Path) -> None:
    """Compress the large files in a WeNet directory for the repository."""
    for path in (model / WEIGHTS, model / PIECES):
        _packed(path).write_bytes(lzma.compress(path.read_bytes(), filters=[TWO_BYTES]))
        path.unlink()


def content(path: Path) -> bytes:
    """Return the content of a file that may be compressed."""
    return path.read_bytes() if path.exists() else lzma.decompress(_packed(path).read_bytes())


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.xz")


def finished_weights(state: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a finished model: the last weights after a decay, otherwise averaged weights."""
    decayed = state["options"]["decay_from"] is not None
    weights: dict[str, Any] = state["optimizer"]["masters" if decayed else "average"]
    return weights


def compact(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state of a sixth of the size, which continues at the beginning of the next epoch.

    It has the averaged weights in float16. It lacks the optimizer's moments, which cover only 20 to 50 steps and
    recover quickly.
    """
    weights = {name: weight.half() for name, weight in state["optimizer"]["average"].items()}
    progress = state["progress"]
    progress = progress | {"epoch": progress["epoch"] + 1, "position": 0, "sizes": {}}
    return state | {"compact": True, "optimizer": {"average": weights}, "progress": progress}


def save_compact(state: dict[str, Any], path: Path, model: Path | None = None) -> None:
    """Write the compact form of a state. Omit the weights if `model` is a WeNet directory that has them."""
    small = compact(state)
    if model:
        average, known = small["optimizer"]["average"], weights_of(model)
        if not all(torch.equal(average.pop(name), weight) for name, weight in known.items()):
            raise ValueError(f"{model}: is not the average of the weights at step {state['progress']['step']}")
        small["weights_of"] = digest_of(model)
    torch.save(small, path)


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state from which training can continue, restored from a compact state."""
    average = {name: weight.float() for name, weight in state["optimizer"]["average"].items()}
    masters = {name: weight.clone() for name, weight in average.items()}
    return state | {"optimizer": {"masters": masters, "average": average, "parts": None}}
