"""Checkpoints of a run: exact ones, of which the last few are kept, and a compact one for the repository."""

import io
import lzma
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

KEPT = 5
WEIGHTS, PACKED = "final.pt", "final.pt.xz"
TWO_BYTES = {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}
"""For xz, which then tells the first byte of a float16 from its second: a sixth smaller instead of a tenth."""
STATISTICS = "encoder.global_cmvn."


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


def load(path: Path, model: Path | None = None) -> dict[str, Any]:
    """The state in an exact or a compact checkpoint.

    `model` is the WeNet directory with the weights of one that was made without them.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state["options"].pop("router_noise", None)  # what runs had before, and dense ones made no use of
    if digest := state.pop("weights_of", None):
        if model is None or digest != digest_of(model):
            raise ValueError(f"{path}: its weights are in another file: the final.pt with SHA-256 {digest}")
        state["optimizer"]["average"] |= weights_of(model)
    return unpacked(state) if state.pop("compact", False) else state


def weights_of(model: Path) -> dict[str, Any]:
    """The weights in a WeNet directory, without the statistics of the features."""
    weights = torch.load(io.BytesIO(_content(model)), map_location="cpu", weights_only=True)
    return {name: weight for name, weight in weights.items() if not name.startswith(STATISTICS)}


def digest_of(model: Path) -> str:
    """What tells the weights in a WeNet directory from others."""
    return sha256(_content(model)).hexdigest()


def pack(model: Path) -> None:
    """Compresses the weights in a WeNet directory, as the repository has them."""
    (model / PACKED).write_bytes(lzma.compress(_content(model), filters=[TWO_BYTES]))
    (model / WEIGHTS).unlink()


def _content(model: Path) -> bytes:
    path = model / WEIGHTS
    return path.read_bytes() if path.exists() else lzma.decompress((model / PACKED).read_bytes())


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


def save_compact(state: dict[str, Any], path: Path, model: Path | None = None) -> None:
    """Writes the compact form of a state; without the weights that a WeNet directory has, if one is given."""
    small = compact(state)
    if model:
        average, known = small["optimizer"]["average"], weights_of(model)
        if not all(torch.equal(average.pop(name), weight) for name, weight in known.items()):
            raise ValueError(f"{model}: is not the average of the weights at step {state['progress']['step']}")
        small["weights_of"] = digest_of(model)
    torch.save(small, path)


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """A state to go on from, out of a compact one."""
    average = {name: weight.float() for name, weight in state["optimizer"]["average"].items()}
    masters = {name: weight.clone() for name, weight in average.items()}
    return state | {"optimizer": {"masters": masters, "average": average, "parts": None}}
