"""Computes features of audio files, for calibration and measurements. Stores and reads files of such features."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import AudioError
from u2moe.runtime.model.features import FeatureStream

Array = npt.NDArray[Any]
KEPT, FORMAT = ".npz", "u2moe calibration 1"
"""Suffix and format name of the files that `keep_calibration` writes."""


def features_of(bundle: Bundle, files: Sequence[Path], limit: int = 6000) -> list[Array]:
    """Return the float32 features [frames, mel] of each audio file. Files too short for the encoder are skipped.

    Reading stops after `limit` frames in total.

    Raises:
        AudioError: a file cannot be read.
    """
    return [frames for _, frames in read_features(bundle, files, limit)]


def read_features(
    bundle: Bundle, files: Sequence[Path], limit: int = 6000, *, is_noisy: bool = False
) -> list[tuple[Path, Array]]:
    """Return the files with their features, as in `features_of`. `is_noisy` adds noise of half a 16-bit step to audio.

    For a file written by `keep_calibration`, the recordings that it stores are returned.
    """
    random = np.random.default_rng(0)
    result: list[tuple[Path, Array]] = []
    for file in files:
        kept = _kept(bundle, file) if file.suffix == KEPT else [(file, None)]
        for name, found in kept:
            if limit <= 0:
                return result
            frames = (_heard(bundle, file, limit, random if is_noisy else None) if found is None else found)[:limit]
            if len(frames) >= bundle.manifest.model.window:
                result.append((name, frames))
                limit -= len(frames)
    return result


def _heard(bundle: Bundle, file: Path, limit: int, random: np.random.Generator | None) -> Array:
    """Return at least the first `limit` frames of a file, or all if it has fewer; add noise if `random` is given."""
    config = bundle.manifest.features
    stream = FeatureStream(config)
    for block in read_blocks(file, config.sample_rate):
        heard = block if random is None else block + random.uniform(-0.5, 0.5, len(block)) / 2**15
        stream.accept(heard.astype(np.float32))
        if stream.num_ready >= limit:
            break
    return stream.take(stream.num_ready)


def _kept(bundle: Bundle, file: Path) -> Iterator[tuple[Path, Array]]:
    """Yield each recording's name and features from a calibration file for this bundle."""
    try:
        with file.open("rb") as stream, np.load(stream) as arrays:
            about, *features = (arrays[name] for name in arrays.files)
        about = json.loads(str(about))
        is_ours = about["format"] == FORMAT and all(
            frames.dtype == np.float32 and frames.shape[1:] == (bundle.manifest.model.feature_size,)
            for frames in features
        )
        names, owner = about["recordings"], about["bundle"]
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise AudioError(f"{file}: cannot be read as a calibration file: {error}") from error
    if owner != bundle.fingerprint:
        raise AudioError(
            f"{file}: was made for bundle {owner[:16]}, expected {bundle.fingerprint[:16]} ({bundle.path})"
        )
    if not is_ours or len(names) != len(features):
        raise AudioError(f"{file}: is incomplete or was written by another version of u2moe")
    yield from zip(map(Path, names), features, strict=True)
