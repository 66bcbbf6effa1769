"""Recordings in portions, as sources deliver them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

STEP_S = 1.0
"""Seconds fed to each stream between two decodes, on average."""


def portions(samples: Samples, random: np.random.Generator | None, rate: int) -> list[Samples]:
    """Samples cut every `STEP_S` seconds (None), or at random into as many."""
    step = int(STEP_S * rate)
    if random is None:
        return np.split(samples, range(step, len(samples), step))
    return np.split(samples, np.sort(random.integers(0, len(samples) + 1, len(samples) // step)))
