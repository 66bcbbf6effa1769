"""A resampler in numpy, for systems that soxr has no wheel for. Slower, and otherwise as good: 90 dB, any split.

A windowed sinc is evaluated at the time of each new sample. Each new sample is one sum of the same products in the same
order, however the samples arrive: that makes the results of any split equal to the last bit.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

_NUM_CROSSINGS = 32
"""Zero crossings of the sinc on either side."""
_ROLL_OFF = 0.945
"""Share of the band that passes; the rest is the transition, above which nothing is left to fold back."""
_KAISER_BETA = 9.0
_BLOCK = 2048
"""New samples per matrix of products."""

Samples = npt.NDArray[np.float32]


class SincResampler:
    """Resamples one channel incrementally; n samples become round(n * target_rate / source_rate).

    Args:
        source_rate: sample rate of the input in Hz, rounded to whole ones.
        target_rate: sample rate of the output in Hz.
    """

    def __init__(self, source_rate: float, target_rate: int) -> None:
        step = Fraction(round(source_rate), target_rate)
        self._numerator, self._denominator = step.numerator, step.denominator
        self._cutoff = min(1.0, 1 / float(step)) * _ROLL_OFF
        self._reach = math.ceil(_NUM_CROSSINGS / self._cutoff)
        self._kept = np.zeros(self._reach, np.float32)  # silence before the first sample
        self._first = -self._reach  # index of the first kept sample
        self._num_received = 0
        self._num_returned = 0
        self._filters: dict[int, Samples] = {}

    def resample_chunk(self, samples: Samples, *, last: bool = False) -> Samples:
        """The next new samples; those near the end are held back until more come, or until `last`."""
        self._num_received += len(samples)
        if last:
            samples = np.concatenate([samples, np.zeros(2 * self._reach, np.float32)])
            total = (2 * self._num_received * self._denominator + self._numerator) // (2 * self._numerator)
        else:
            total = (self._num_received - self._reach) * self._denominator // self._numerator
        self._kept = np.concatenate([self._kept, samples])
        parts = [np.zeros(0, np.float32)]
        while self._num_returned < total:
            parts.append(self._block(min(_BLOCK, total - self._num_returned)))
        return np.concatenate(parts)

    def _block(self, num: int) -> Samples:
        """The next `num` new samples, and forgets old ones that none needs any more."""
        places = np.arange(self._num_returned, self._num_returned + num, dtype=np.int64) * self._numerator
        whole, phases = np.divmod(places, self._denominator)
        firsts = whole - self._reach + 1 - self._first
        windows = self._kept[firsts[:, np.newaxis] + np.arange(2 * self._reach)]
        filters = np.stack([self._filter(phase) for phase in phases.tolist()])
        taken: Samples = (windows * filters).sum(axis=1)
        self._num_returned += num
        following = self._num_returned * self._numerator // self._denominator - self._reach + 1
        forgotten = max(min(following - self._first, len(self._kept)), 0)
        self._kept = self._kept[forgotten:]
        self._first += forgotten
        return taken

    def _filter(self, phase: int) -> Samples:
        """Factors [taps] for a new sample that lies phase / denominator after an old one."""
        found = self._filters.get(phase)
        if found is None:
            distances = np.arange(1 - self._reach, self._reach + 1) - phase / self._denominator
            shares = np.clip(distances / self._reach, -1, 1)
            window = np.i0(_KAISER_BETA * np.sqrt(1 - shares**2)) / np.i0(_KAISER_BETA)
            found = (self._cutoff * np.sinc(self._cutoff * distances) * window).astype(np.float32)
            self._filters[phase] = found
        return found
