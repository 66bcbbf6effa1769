"""Check arrays of samples, scale them to float32, and resample them.

For any split of the input into buffers, soxr's stream returns bit-identical samples. Their number is exactly what the
ratio of the rates requires. On systems for which soxr has no wheel, `SincResampler` replaces it.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import AudioError

Samples = npt.NDArray[np.float32]
"""Samples in [-1, 1], of one channel [n] unless a docstring states other axes."""
LOUDEST = 8.0
"""Largest accepted magnitude of floats. Resampled or decoded audio may exceed 1, but floats above this limit are taken
for unscaled integers."""
_LOWEST_RATE = 1000
_HIGHEST_RATE = 384_000


def as_samples(samples: npt.ArrayLike) -> Samples:
    """Return samples of one channel as float32 [n]; int16 is scaled. Raises AudioError if they are invalid."""
    if samples is None or isinstance(samples, str | bytes | bytearray | memoryview):
        found = f"samples must be an array, got {type(samples).__name__}"
        raise AudioError(f"{found}: convert bytes with np.frombuffer(data, np.int16)")
    try:
        array = np.asarray(samples)
    except (ValueError, TypeError, RuntimeError) as error:  # the last two are of PyTorch
        raise AudioError(f"samples are not an array: {error}") from error
    if array.ndim != 1:
        raise AudioError(f"samples must be of one channel, with one axis, got shape {array.shape}")
    if array.size == 0:
        return np.zeros(0, np.float32)
    if array.dtype.newbyteorder("=") == np.int16:
        return array.astype(np.float32) / np.float32(32768)
    if array.dtype.kind != "f":
        raise AudioError(f"samples must be float32 in [-1, 1] or int16, got {array.dtype}")
    loudest = np.abs(array).max()
    if not np.isfinite(loudest):
        raise AudioError("samples contain NaN or infinity")
    if loudest > LOUDEST:
        raise AudioError(f"samples reach {loudest:g}, expected floats in [-1, 1]: divide integers by their full scale")
    return array.astype(np.float32)


def checked_rate(sample_rate: object) -> float:
    """Check a sample rate in Hz. Raise AudioError if it is not a number, or is out of range."""
    if isinstance(sample_rate, list | tuple | np.ndarray) and np.size(sample_rate) != 1:
        raise AudioError("sample_rate must be the first argument: (sample_rate, samples)")
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | float | np.integer | np.floating):
        raise AudioError(f"sample rate must be a number of Hz, got {sample_rate!r:.80}")
    sample_rate = float(sample_rate) if isinstance(sample_rate, np.floating | np.integer) else sample_rate
    if not _LOWEST_RATE <= sample_rate <= _HIGHEST_RATE:
        raise AudioError(f"sample rate must be between {_LOWEST_RATE} and {_HIGHEST_RATE} Hz, got {sample_rate}")
    return sample_rate


class Resampler:
    """Incremental resampler of one channel. Its output does not depend on the split of its input. Raises AudioError."""

    def __init__(self, source_rate: float, target_rate: int) -> None:
        self.source_rate = source_rate = checked_rate(source_rate)
        self.target_rate = target_rate
        self._resample: Callable[..., Samples] | None = None
        if source_rate != target_rate:
            try:
                import soxr  # noqa: PLC0415
            except ModuleNotFoundError:
                self._resample = SincResampler(source_rate, target_rate).resample_chunk
            else:
                stream = soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality="HQ")
                self._resample = stream.resample_chunk

    def accept(self, samples: Samples) -> Samples:
        """Append samples, and return the resampled ones. The filter holds back some until more arrive."""
        return samples if self._resample is None else self._resample(samples)

    def finish(self) -> Samples:
        """Return the samples that were held back."""
        none = np.zeros(0, np.float32)
        return none if self._resample is None else self._resample(none, last=True)


def convert(samples: npt.ArrayLike, source_rate: float, sample_rate: int) -> Iterator[Samples]:
    """Yield samples at `sample_rate`, in buffers of about ten seconds. Raises AudioError before the first buffer."""
    resampler = Resampler(source_rate, sample_rate)
    accepted, size = as_samples(samples), int(10 * resampler.source_rate)
    for start in range(0, len(accepted), size):
        yield resampler.accept(accepted[start : start + size])
    yield resampler.finish()


_NUM_CROSSINGS = 32  # zero crossings of the sinc on each side
_ROLL_OFF = 0.945  # Fraction of the band that passes. The rest is the transition band, which prevents aliasing.
_KAISER_BETA = 9.0
_MOST_AT_ONCE = 2048  # maximum number of output samples computed at once, which limits memory


class SincResampler:
    """Incremental resampler of one channel for systems without a soxr wheel: slower, with the same quality (90 dB).

    Each output sample is a sum of input samples weighted by a windowed sinc. The terms are always added in the same
    order, so the output is bit-identical for any split of the input. n samples become
    round(n * target_rate / source_rate). The rates are in Hz; `source_rate` is rounded to an integer.
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
        """Return the next output samples. Unless `last`, hold back samples near the end until more input arrives."""
        self._num_received += len(samples)
        if last:
            samples = np.concatenate([samples, np.zeros(2 * self._reach, np.float32)])
            total = (2 * self._num_received * self._denominator + self._numerator) // (2 * self._numerator)
        else:
            total = (self._num_received - self._reach) * self._denominator // self._numerator
        self._kept = np.concatenate([self._kept, samples])
        parts = [np.zeros(0, np.float32)]
        while self._num_returned < total:
            end = min(total, self._num_returned + _MOST_AT_ONCE)
            places = np.arange(self._num_returned, end, dtype=np.int64) * self._numerator
            whole, phases = np.divmod(places, self._denominator)
            firsts = whole - self._reach + 1 - self._first
            windows = self._kept[firsts[:, np.newaxis] + np.arange(2 * self._reach)]
            filters = np.stack([self._filter(phase) for phase in phases.tolist()])
            parts.append((windows * filters).sum(axis=1))
            self._num_returned = end
            # Drop input samples that are no longer needed.
            following = end * self._numerator // self._denominator - self._reach + 1
            forgotten = max(min(following - self._first, len(self._kept)), 0)
            self._kept = self._kept[forgotten:]
            self._first += forgotten
        return np.concatenate(parts)

    def _filter(self, phase: int) -> Samples:
        """Return filter taps for an output sample between two input samples, phase / denominator after the first."""
        if phase not in self._filters:
            distances = np.arange(1 - self._reach, self._reach + 1) - phase / self._denominator
            shares = np.clip(distances / self._reach, -1, 1)
            window = np.i0(_KAISER_BETA * np.sqrt(1 - shares**2)) / np.i0(_KAISER_BETA)
            self._filters[phase] = (self._cutoff * np.sinc(self._cutoff * distances) * window).astype(np.float32)
        return self._filters[phase]
