"""Feature statistics from WeNet's global_cmvn file, JSON or Kaldi text. Only needed when the state dict has none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from u2moe.export.text_files import read_text
from u2moe.runtime.errors import CheckpointError

CMVN_MEAN = "encoder.global_cmvn.mean"
CMVN_ISTD = "encoder.global_cmvn.istd"
"""Names of the statistics in a state dict."""
SMALLEST_VARIANCE = 1e-20
ROUNDING = 1e-6
"""Share of the mean square by which rounding, in files of seven digits, may make a variance negative."""


def read_cmvn(path: Path, size: int) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation [size] each, of `size` mel bins."""
    text = read_text(
        path,
        purpose="the network was trained with feature statistics, and neither the state dict "
        f"({CMVN_MEAN}) nor this file has them",
    )
    try:
        sums, squares, count = _parse_json(text) if text.lstrip().startswith("{") else _parse_kaldi(text)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON or Kaldi text statistics: {error}") from error
    if sums.shape != (size,) or squares.shape != (size,):
        raise CheckpointError(f"{path}: has {sums.size} means and {squares.size} variances, expected {size} of each")
    if not (np.isfinite(count) and count > 0 and np.isfinite(sums).all() and np.isfinite(squares).all()):
        raise CheckpointError(f"{path}: has sums that are not finite, or no frames (frame count {count})")
    with np.errstate(over="ignore", invalid="ignore"):
        mean = sums / count
        mean_square = squares / count
        variance = mean_square - mean * mean
        if (variance < -ROUNDING * mean_square).any():
            raise CheckpointError(f"{path}: has sums of squares that are too small for its sums and {count:g} frames")
        variance = np.maximum(variance, SMALLEST_VARIANCE)
        statistics = mean.astype(np.float32), (1.0 / np.sqrt(variance)).astype(np.float32)
    if not all(np.isfinite(values).all() for values in statistics):
        raise CheckpointError(f"{path}: has means or variances that are not finite in float32")
    return torch.from_numpy(statistics[0]), torch.from_numpy(statistics[1])


def _parse_json(text: str) -> tuple[np.ndarray, np.ndarray, float]:
    stats = json.loads(text)
    sums = np.array(stats["mean_stat"], dtype=np.float64)
    return sums, np.array(stats["var_stat"], dtype=np.float64), float(stats["frame_num"])


def _parse_kaldi(text: str) -> tuple[np.ndarray, np.ndarray, float]:
    """A matrix of two rows: sums and the count, sums of squares and 0."""
    words = text.split()
    if len(words) < 6 or words[0] != "[" or words[-1] != "]" or len(words) % 2:
        raise ValueError("expected '[ sums count sums-of-squares 0 ]'")
    matrix = np.array(words[1:-1], dtype=np.float64).reshape(2, -1)
    return matrix[0, :-1], matrix[1, :-1], float(matrix[0, -1])
