"""Audio files as features, for calibration and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.model.features import FeatureStream

Array = npt.NDArray[Any]


def features_of(bundle: Bundle, files: Sequence[Path], limit: int = 6000) -> list[Array]:
    """Features of audio files, float32 [frames, mel] each: the first `limit` frames of all; skips too short files.

    Raises:
        AudioError: a file cannot be read.
    """
    return [frames for _, frames in read_features(bundle, files, limit)]


def read_features(
    bundle: Bundle, files: Sequence[Path], limit: int = 6000, *, is_noisy: bool = False
) -> list[tuple[Path, Array]]:
    """As `features_of`, with the files; `is_noisy` adds noise of half a step of 16 bits."""
    config, random = bundle.manifest.features, np.random.default_rng(0)
    result: list[tuple[Path, Array]] = []
    for file in files:
        stream = FeatureStream(config)
        for block in read_blocks(file, config.sample_rate):
            heard = block + random.uniform(-0.5, 0.5, len(block)) / 2**15 if is_noisy else block
            stream.accept(heard.astype(np.float32))
            if stream.num_ready >= limit:
                break
        frames = stream.take(min(stream.num_ready, limit))
        if len(frames) >= bundle.manifest.model.window:
            result.append((file, frames))
            limit -= len(frames)
        if limit <= 0:
            break
    return result
