"""Pads sources that begin or end in the middle of a sound with silence.

Without it the encoder has no context before the first sound of a tightly cut recording, and at its end it drops what is
too short for a frame but may be the end of a word.
"""

from __future__ import annotations

import math

import numpy as np

from u2moe.runtime.audio.arrays import Samples

SOUND = 2.0**-8
"""A feature frame whose samples span more than this contains a sound: 128 steps of 16 bits, half a step of 8 bits.
Noise 60 dB below full scale counts as sound, as does the silent room of many microphones."""


class Padding:
    """Pads the samples of one source with silence, for any split of the samples.

    Attributes:
        num_before: samples of silence added before the source.

    Args:
        padding_s: see `DecodingOptions`.
        sample_rate: of the samples, in Hz.
        frame_len: samples of a feature frame.
    """

    def __init__(self, padding_s: float, sample_rate: int, frame_len: int) -> None:
        self.num_before = 0
        self._silence = np.zeros(math.floor(padding_s * sample_rate + 0.5), np.float32)
        self._frame_len = frame_len
        self._has_begun = False
        self._edge = self._silence[:0]  # all samples until it has begun, then the last ones

    @property
    def most_to_come(self) -> int:
        """Largest number of samples that the next call may return beyond those it is given."""
        return 0 if self._has_begun else len(self._silence) + len(self._edge)

    def accept(self, samples: Samples) -> Samples:
        """Samples to pass on after receiving `samples` [n]; none until they fill a feature frame."""
        if not len(self._silence):
            return samples
        is_long = len(samples) >= self._frame_len
        self._edge = samples if self._has_begun and is_long else np.concatenate([self._edge, samples])
        if not self._has_begun:
            return self._edge[:0] if len(self._edge) < self._frame_len else self._begin()
        self._edge = self._edge[-self._frame_len :].copy()  # not a view: it would keep all of the samples
        return samples

    def finish(self) -> Samples:
        """Samples to pass on at the end."""
        rest = self._edge[:0] if self._has_begun else self._begin()
        return np.concatenate([rest, self._silence]) if _is_sound(self._edge) else rest

    def _begin(self) -> Samples:
        self._has_begun = True
        samples, self._edge = self._edge, self._edge[-self._frame_len :].copy()
        if not _is_sound(samples[: self._frame_len]):
            return samples
        self.num_before = len(self._silence)
        return np.concatenate([self._silence, samples])


def padded(samples: Samples, padding_s: float, sample_rate: int, frame_len: int) -> Samples:
    """A whole recording [n] with its padding."""
    padding = Padding(padding_s, sample_rate, frame_len)
    return np.concatenate([padding.accept(samples), padding.finish()])


def _is_sound(samples: Samples) -> bool:
    return len(samples) > 0 and float(samples.max()) - float(samples.min()) > SOUND
