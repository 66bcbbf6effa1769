"""The features of a bundle's graph against those that the runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from u2moe.export.comparison import Comparison
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.errors import ParityError
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings

LIMIT = 1e-4
"""Largest difference on noise: both compute in double precision and round once."""


def compare_features(file: Path, manifest: Manifest) -> Comparison:
    """Compare on noise, and on the shortest inputs: no sample, one sample, one less than a frame, and a frame.

    Args:
        file: the graph.
        manifest: manifest of its bundle.

    Raises:
        ParityError: a difference beyond the limit, or another number of frames.
        BundleError: the configuration is impossible.
    """
    session = Session(file, contract.features(), manifest, SessionSettings())
    noise, length = parity_samples(manifest, 2.0), manifest.features.frame_len
    difference, num_values = 0.0, 0
    for samples in (noise, noise[:0], noise[:1], noise[: length - 1], noise[:length]):
        expected = fbank(samples, manifest.features)
        found = session.run({"samples": samples[np.newaxis]})["features"][0]
        if found.shape != expected.shape:
            raise ParityError(f"{file}: {len(samples)} samples gave features {found.shape}, expected {expected.shape}")
        difference = max(difference, float(np.abs(found - expected).max(initial=0.0)))
        num_values += expected.size
    if not difference <= LIMIT:
        raise ParityError(f"{file}: features differ from the runtime's by {difference:.3g}, limit {LIMIT:.3g}")
    return Comparison(case="front end", tensor="features", difference=difference, limit=LIMIT, num_values=num_values)


def parity_samples(manifest: Manifest, seconds: float) -> npt.NDArray[np.float32]:
    """Seeded noise [samples] that swells and fades as speech does."""
    num_samples = int(seconds * manifest.features.sample_rate)
    noise = np.random.default_rng(0).standard_normal(num_samples)
    swell = np.abs(np.sin(np.arange(num_samples) / 3000)) * 0.2
    return (noise * swell).astype(np.float32)


def parity_features(manifest: Manifest, seconds: float) -> npt.NDArray[np.float32]:
    """Features [frames, mel] of `parity_samples`."""
    return fbank(parity_samples(manifest, seconds), manifest.features)
