"""How sure words are: what the heads of a model give their tokens, and what that has proved to be worth. No arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from u2moe.runtime.manifest import Calibration

_SMALLEST = 1e-6
"""Nothing is surer than one minus this: odds must be finite."""


def word_confidence(probabilities: Sequence[float]) -> float:
    """Confidence of a word, given the probability of each of its tokens: that of the least sure one.

    A word is right when all its tokens are. On recordings of people this told right from wrong words better than the
    geometric mean that is common.
    """
    return min(probabilities)


def calibrated(confidence: float, calibration: Calibration | None) -> float:
    """A confidence with its log-odds scaled and shifted (Platt), so that it says how often such words are right."""
    if calibration is None:
        return confidence
    clipped = min(max(confidence, _SMALLEST), 1 - _SMALLEST)
    odds = calibration.scale * math.log(clipped / (1 - clipped)) + calibration.bias
    return 1 / (1 + math.exp(-min(max(odds, -700.0), 700.0)))
