"""Silence around sources that begin or end in the middle of a sound, as recordings that were cut do.

Such a source starts with its first sound: the encoder has heard nothing before it. At its end the encoder leaves out a
remainder that is too short for a frame, and that may be the end of a word.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from u2moe.runtime.audio.arrays import Samples

SOUND = 2.0**-8
"""The samples of a feature frame with a sound in it differ by more than this: 128 steps of 16 bits, half a step of 8.
Noise 60 dB below full scale does. So a silent room is a sound to many microphones, and gets silence."""


class Padding:
    """Adds silence to the samples of one source, however they are split.

    Attributes:
        num_before: samples of silence that came before the source.

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
        """Samples that may be heard with the next ones, besides these: what is kept until it has begun, and silence."""
        return 0 if self._has_begun else len(self._silence) + len(self._edge)

    def accept(self, samples: Samples) -> Samples:
        """What is to be heard when these samples [n] have come: nothing until they fill a frame."""
        if not len(self._silence):
            return samples
        is_long = len(samples) >= self._frame_len
        self._edge = samples if self._has_begun and is_long else np.concatenate([self._edge, samples])
        if not self._has_begun:
            return self._edge[:0] if len(self._edge) < self._frame_len else self._begin()
        self._edge = self._edge[-self._frame_len :].copy()  # not a view: it would keep all of the samples
        return samples

    def finish(self) -> Samples:
        """What is to be heard after the last sample."""
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
    """A whole recording [n] as it is heard."""
    padding = Padding(padding_s, sample_rate, frame_len)
    return np.concatenate([padding.accept(samples), padding.finish()])


def _is_sound(samples: Samples) -> bool:
    return len(samples) > 0 and float(samples.max()) - float(samples.min()) > SOUND
