"""Add silence to sources that begin or end in the middle of a sound.

Without padding, the encoder has no context before the first sound of a tightly cut recording. At the end of the
recording, samples that do not fill a frame are dropped, although they may be the end of a word.
"""

import math

import numpy as np

from u2moe.runtime.audio.arrays import Samples

SOUND = 2.0**-8
"""A feature frame contains sound if its samples span a larger range than this: 128 steps of 16 bits, or half a step of
8 bits. Noise at 60 dB below full scale counts as sound; many microphones have such noise in a silent room."""


class Padding:
    """Incremental padding with silence, for any split into buffers. `frame_len` is in samples per feature frame."""

    def __init__(self, padding_s: float, sample_rate: int, frame_len: int) -> None:
        self.num_before = 0  # number of samples of silence added before the source
        self._silence = np.zeros(math.floor(padding_s * sample_rate + 0.5), np.float32)
        self._frame_len = frame_len
        self._has_begun = False
        self._edge = self._silence[:0]  # all samples until the source has begun, then the last frame

    @property
    def most_to_come(self) -> int:
        """Largest number of samples that the next call of `accept` may return in addition to its input."""
        return 0 if self._has_begun else len(self._silence) + len(self._edge)

    def accept(self, samples: Samples) -> Samples:
        """Accept samples [n], and return the samples to pass on; none until the first feature frame is complete."""
        if not len(self._silence):
            return samples
        is_long = len(samples) >= self._frame_len
        self._edge = samples if self._has_begun and is_long else np.concatenate([self._edge, samples])
        if not self._has_begun:
            return self._edge[:0] if len(self._edge) < self._frame_len else self._begin()
        self._edge = self._edge[-self._frame_len :].copy()  # copy, because a view would keep all samples in memory
        return samples

    def finish(self) -> Samples:
        """Return the samples to pass on at the end."""
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
    """Return a whole recording [n] with its padding."""
    padding = Padding(padding_s, sample_rate, frame_len)
    return np.concatenate([padding.accept(samples), padding.finish()])


def _is_sound(samples: Samples) -> bool:
    return len(samples) > 0 and float(samples.max()) - float(samples.min()) > SOUND
