"""Log-mel filter banks as WeNet trains with (Kaldi's), in numpy, any number of frames at once. No normalisation.

The definition is Kaldi's with snip_edges, without dither: remove the mean, pre-emphasis, povey window, power spectrum,
mel bands from 20 Hz to the Nyquist frequency, logarithm. kaldi-native-fbank gives the same (the tests compare), but
takes samples and frames one by one through Python: four times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import BundleError, StreamError

if TYPE_CHECKING:
    from u2moe.runtime.manifest import FeatureConfig

_INT16_SCALE = np.float32(32768.0)
_PREEMPHASIS = np.float32(0.97)
_LOWEST_HZ = 20.0
_FLOOR = np.finfo(np.float32).eps
_BLOCK = 128
"""Frames that are computed together: more gain nothing, and their spectra would no longer fit into the cache."""


class Fbank:
    """Samples in any portions to frames: whatever the split, the same frames to the last bit.

    A frame needs a whole window of samples (Kaldi's snip_edges): what is left at the end makes no frame. Memory is
    flat: frames are handed out once and forgotten.

    Few frames at once cost more each. So samples may be kept first (`push`), and their frames taken when there are many
    (`take`); `accept` does both.

    Raises:
        BundleError: a front end that makes no sense, such as more bins than the spectrum has.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        # As Kaldi rounds, down: 220.5 samples are 220.
        self._window_len = int(config.sample_rate * 0.001 * config.frame_length_ms)
        self._shift = int(config.sample_rate * 0.001 * config.frame_shift_ms)
        if self._window_len < 2:
            raise BundleError(f"features of {config} cannot be computed: a frame has {self._window_len} samples")
        self._fft_len = 1 << (self._window_len - 1).bit_length()
        phase = 2 * np.pi * np.arange(self._window_len) / (self._window_len - 1)
        self._window = ((0.5 - 0.5 * np.cos(phase)) ** 0.85).astype(np.float32)
        self._bins, self._weights, self._bands = _mel_bands(config, self._fft_len)
        self._pending: list[npt.NDArray[np.float32]] = []
        self._num_pending = 0
        self._finished = False

    def accept(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Frames [frames, mel] that these samples, float32 [n] in [-1, 1], complete."""
        self.push(samples)
        return self.take()

    def push(self, samples: npt.NDArray[np.float32]) -> None:
        """Keep samples, float32 [n] in [-1, 1], which must not be changed until the next `take`."""
        if self._finished:
            raise StreamError("features are finished: no samples can follow")
        self._pending.append(samples)
        self._num_pending += len(samples)

    @property
    def num_ready(self) -> int:
        """Frames that `take` returns."""
        return max((self._num_pending - self._window_len) // self._shift + 1, 0)

    def take(self) -> npt.NDArray[np.float32]:
        """Frames [frames, mel] of the samples so far that were not taken before."""
        num_ready = self.num_ready
        frames = np.empty((num_ready, self.config.num_mel_bins), np.float32)
        if num_ready == 0:
            return frames
        samples = np.concatenate(self._pending)
        step = samples.itemsize
        windows: npt.NDArray[np.float32] = np.ndarray(
            (num_ready, self._window_len), np.float32, samples, strides=(self._shift * step, step)
        )
        for start in range(0, num_ready, _BLOCK):
            frames[start : start + _BLOCK] = self._log_mel(windows[start : start + _BLOCK])
        rest = samples[num_ready * self._shift :].copy()
        self._pending, self._num_pending = [rest], len(rest)
        return frames

    def finish(self) -> npt.NDArray[np.float32]:
        """Last frames [frames, mel]; nothing can follow."""
        if self._finished:
            raise StreamError("features are finished already")
        self._finished = True
        return self.take()

    def _log_mel(self, windows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Frames [frames, mel] of windows [frames, window_len].

        Each row is computed by itself: no matrix multiplication, whose rounding depends on the number of rows.
        """
        frames = windows * _INT16_SCALE
        frames -= frames.mean(axis=1, keepdims=True)
        padded = np.zeros((len(windows), self._fft_len), np.float32)
        inside = padded[:, : self._window_len]
        np.multiply(frames[:, :-1], _PREEMPHASIS, out=inside[:, 1:])
        np.multiply(frames[:, 0], _PREEMPHASIS, out=inside[:, 0])  # as if the sample before were the same
        np.subtract(frames, inside, out=inside)
        inside *= self._window
        spectrum = np.fft.rfft(padded, axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        energies = np.add.reduceat(power[:, self._bins] * self._weights, self._bands, axis=1)
        return np.log(np.maximum(energies, _FLOOR)).astype(np.float32, copy=False)


def _mel_bands(
    config: FeatureConfig, fft_len: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    """Bins of the spectrum and their weights, band after band, and where each band begins among them."""
    nyquist = config.sample_rate / 2
    edges = np.linspace(_mel(_LOWEST_HZ), _mel(nyquist), config.num_mel_bins + 2)
    # The bin of the Nyquist frequency itself has no weight.
    bins = _mel(np.arange(fft_len // 2) * (nyquist / (fft_len // 2)))
    left, centre, right = edges[:-2, np.newaxis], edges[1:-1, np.newaxis], edges[2:, np.newaxis]
    weights = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    band, inside = np.nonzero(weights > 0)
    starts = np.searchsorted(band, np.arange(config.num_mel_bins))
    if len(np.unique(band)) < config.num_mel_bins:
        raise BundleError(
            f"features of {config} cannot be computed: bands without any of the {len(bins)} bins of the spectrum"
        )
    return inside, weights[band, inside].astype(np.float32), starts


def _mel(frequency: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return 1127.0 * np.log1p(np.asarray(frequency, np.float64) / 700.0)
