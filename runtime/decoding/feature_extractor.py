"""Compute windows of features, and their loudness, from the samples of a stream."""

from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.arrays import Resampler
from u2moe.runtime.audio.padding import Padding
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.decoding.pauses import loudness
from u2moe.runtime.errors import AudioError, StreamError
from u2moe.runtime.model.encoder import Windows
from u2moe.runtime.model.features import FeatureStream


class FeatureExtractor:
    """Turns samples into windows of features, one for each chunk of `chunk_size` encoder frames.

    If `chunk_size` is None, there is a single window. With `knows_last`, a window cannot be taken before it is known
    whether more windows follow; see `Windows`. Up to `padding_s` seconds of silence are added before and after the
    samples; see `Padding`. `library` as in `fbank`. `num_samples` counts the samples received, at the model's rate,
    without the added silence. `window` is the last window taken [frames, mel].
    """

    def __init__(
        self, manifest: Manifest, chunk_size: int | None, *, knows_last: bool, padding_s: float, library: Path | None
    ) -> None:
        self.num_samples = self._num_heard = 0
        self.is_finished = False
        self.window = np.zeros((0, manifest.model.feature_size), np.float32)
        self._config, self._front_end = manifest.model, manifest.features
        self._sample_rate = manifest.features.sample_rate
        self._padding = Padding(padding_s, self._sample_rate, manifest.features.frame_len)
        self._resampler: Resampler | None = None
        self._features = FeatureStream(manifest.features, library)
        self._windows = Windows(manifest.model, chunk_size, knows_last=knows_last)
        self._levels = array("f")  # loudness of feature frames from number `_levels_start` on
        self._levels_start = 0

    def accept(self, sample_rate: float, samples: npt.NDArray[np.float32]) -> None:
        """Append samples, float32 [n]. Raises StreamError after `finish`, AudioError for a wrong or changed rate."""
        if self.is_finished:
            raise StreamError("the input is finished: reset the stream, or create another")
        if self._resampler is None:
            self._resampler = Resampler(sample_rate, self._sample_rate)
        if sample_rate != (before := self._resampler.source_rate):
            raise AudioError(f"sample rate changed from {before} to {sample_rate} Hz in a stream")
        self._accept(self._resampler.accept(samples))

    def finish(self) -> None:
        """Finish the input; the last window may then be short. Raises StreamError if it is already finished."""
        if self.is_finished:
            raise StreamError("the input of this stream is already finished")
        if self._resampler is not None:
            self._accept(self._resampler.finish())
        self._hear(self._padding.finish())
        self._windows.finish()
        self.is_finished = True

    @property
    def duration(self) -> float:
        """Seconds of samples received."""
        return self.num_samples / self._sample_rate

    @property
    def lead_s(self) -> float:
        """Seconds of silence added before the first sample, rounded to milliseconds like the times in results."""
        return (self._padding.num_before * 1000 + self._sample_rate // 2) // self._sample_rate / 1000

    @property
    def end_s(self) -> float:
        """Seconds of the source so far, rounded down to whole milliseconds."""
        return self.num_samples * 1000 // self._sample_rate / 1000

    @property
    def has_window(self) -> bool:
        """Whether `take_window` will succeed."""
        return self._windows.ready(self._features.num_ready)

    @property
    def missing_s(self) -> float:
        """Seconds of audio still needed for the next window. The resampler may need a little more.

        Before the first frame, the value may be too low: it is not yet known whether silence will be added.
        """
        num_frames = self._windows.num_missing
        if num_frames <= self._features.num_ready:
            return 0.0
        num_known = self._num_heard + self._padding.most_to_come
        return max(self._features.num_needed(num_frames) - num_known, 0) / self._sample_rate

    @property
    def is_exhausted(self) -> bool:
        """Whether all windows have been taken."""
        return self.is_finished and not self.has_window

    @property
    def window_is_full(self) -> bool:
        """Whether `window` has the maximum length."""
        return len(self.window) >= self._windows.length

    @property
    def num_window_frames(self) -> int:
        """Number of encoder frames of the last window."""
        return (len(self.window) - self._config.window) // self._config.subsampling_rate + 1

    def take_window(self) -> bool:
        """Take the next window; return False if there is none."""
        if not self.has_window:
            return False
        features = self._features.take(self._windows.num_missing)
        self._levels.frombytes(loudness(features, self._front_end).tobytes())
        self._windows.accept(features)
        window = self._windows.take()
        if window is None:
            return False
        self.window = window
        return True

    def shorten_window(self, num_frames: int) -> None:
        """End the last window after `num_frames` encoder frames. The next window starts there."""
        self._windows.put_back(self.window[num_frames * self._config.subsampling_rate : self._windows.stride])
        self.window = self.window[: self._config.num_features(num_frames)]

    def repeat_window(self, num_frames: int) -> None:
        """Make the next window begin with the last `num_frames` encoder frames of this one."""
        rate, end = self._config.subsampling_rate, self.num_window_frames
        self._windows.put_back(self.window[(end - num_frames) * rate : end * rate])

    def levels(self, num_frames: int) -> npt.NDArray[np.float32]:
        """Return the loudness of the first `num_frames` feature frames that have not been discarded."""
        return np.array(self._levels[:num_frames], np.float32)

    def forget(self, num_frames: int) -> None:
        """Discard the loudness of everything before an encoder frame."""
        start = num_frames * self._config.subsampling_rate
        del self._levels[: start - self._levels_start]
        self._levels_start = start

    def _accept(self, samples: npt.NDArray[np.float32]) -> None:
        self.num_samples += len(samples)
        self._hear(self._padding.accept(samples))

    def _hear(self, samples: npt.NDArray[np.float32]) -> None:
        self._num_heard += len(samples)
        self._features.accept(samples)
