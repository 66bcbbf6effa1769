"""Confidences of words from the probabilities of their tokens."""

import math
from collections.abc import Sequence

from u2moe.runtime.bundle.manifest import Calibration

_SMALLEST = 1e-6
"""Confidences are clipped to this distance from 0 and 1 to keep their odds finite."""


def word_confidence(probabilities: Sequence[float], calibration: Calibration | None) -> float:
    """Return the confidence of a word: the lowest probability of its tokens, calibrated by Platt scaling.

    A word is correct only if all its tokens are. On real recordings, the minimum distinguished correct
    words from incorrect ones better than the usual geometric mean did. The calibration scales and shifts the log-odds,
    to match the share of correct words.
    """
    confidence = min(probabilities)
    if calibration is None:
        return confidence
    clipped = min(max(confidence, _SMALLEST), 1 - _SMALLEST)
    odds = calibration.scale * math.log(clipped / (1 - clipped)) + calibration.bias
    return 1 / (1 + math.exp(-min(max(odds, -700.0), 700.0)))
