"""Arrays of samples: checked, scaled to float32, and resampled. No files.

soxr's stream gives the same samples to the last bit for any split, and exactly as many as the ratio of the rates says.
Where soxr has no wheel, `resampling` takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.resampling import SincResampler
from u2moe.runtime.errors import AudioError

Samples = npt.NDArray[np.float32]
"""Samples of one channel [n] in [-1, 1]."""
LOUDEST = 8.0
"""Floats may exceed 1 (after resampling or decoding), but beyond this they are unscaled integers."""
_LOWEST_RATE = 1000
_HIGHEST_RATE = 384_000


def as_samples(samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """One channel as float32 [n] in [-1, 1]; int16 is scaled.

    Raises:
        AudioError: more than one axis, another element type, NaN or infinity, or values far outside [-1, 1].
    """
    if samples is None or isinstance(samples, str | bytes | bytearray | memoryview):
        raise AudioError(
            f"samples must be an array, got {type(samples).__name__}: raw 16-bit audio is np.frombuffer(data, np.int16)"
        )
    try:
        array = np.asarray(samples)
    except ValueError as error:
        raise AudioError(f"samples are not an array: {error}") from error
    if array.ndim != 1:
        raise AudioError(f"samples must have one axis, got shape {array.shape}: mix the channels first")
    if array.size == 0:
        return np.zeros(0, np.float32)
    if array.dtype == np.int16:
        return array.astype(np.float32) / np.float32(32768)
    if array.dtype.kind != "f":
        raise AudioError(f"samples must be float32 in [-1, 1] or int16, got {array.dtype}")
    loudest = np.abs(array).max()
    if not np.isfinite(loudest):
        raise AudioError("samples hold NaN or infinity")
    if loudest > LOUDEST:
        raise AudioError(f"samples reach {loudest:g}, expected floats in [-1, 1]: divide by the largest integer first")
    return array.astype(np.float32)


def checked_rate(sample_rate: object) -> float:
    """A sample rate in Hz.

    Raises:
        AudioError: not a number, or none that audio has.
    """
    if isinstance(sample_rate, list | tuple | np.ndarray) and np.size(sample_rate) != 1:
        raise AudioError("sample rate first: the arguments are (sample_rate, samples)")
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | float | np.integer | np.floating):
        raise AudioError(f"sample rate must be a number of Hz, got {sample_rate!r:.80}")
    if not _LOWEST_RATE <= sample_rate <= _HIGHEST_RATE:
        raise AudioError(f"sample rate must be between {_LOWEST_RATE} and {_HIGHEST_RATE} Hz, got {sample_rate}")
    return float(sample_rate) if isinstance(sample_rate, np.floating | np.integer) else sample_rate


class Resampler:
    """Resamples one channel incrementally: any split gives the same samples.

    Raises:
        AudioError: an invalid sample rate.
    """

    def __init__(self, source_rate: float, target_rate: int) -> None:
        self.source_rate = checked_rate(source_rate)
        self.target_rate = target_rate
        self._stream = _stream(source_rate, target_rate) if source_rate != target_rate else None

    def accept(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The next samples at the target rate; some are held back for the filter."""
        if self._stream is None:
            return samples
        resampled: npt.NDArray[np.float32] = self._stream.resample_chunk(samples)
        return resampled

    def finish(self) -> npt.NDArray[np.float32]:
        """The samples that were held back."""
        if self._stream is None:
            return np.zeros(0, np.float32)
        resampled: npt.NDArray[np.float32] = self._stream.resample_chunk(np.zeros(0, np.float32), last=True)
        return resampled


def _stream(source_rate: float, target_rate: int) -> Any:
    """A resampler: soxr's, or our own on systems for which soxr has no wheel."""
    try:
        import soxr  # noqa: PLC0415
    except ModuleNotFoundError:
        return SincResampler(source_rate, target_rate)
    return soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality="HQ")


def convert(
    samples: npt.ArrayLike, source_rate: float, sample_rate: int, block_s: float = 10.0
) -> Iterator[npt.NDArray[np.float32]]:
    """Samples of one channel at `sample_rate`, in blocks of about `block_s` seconds.

    Raises:
        AudioError: invalid samples or rate; raised before the first block.
    """
    resampler = Resampler(source_rate, sample_rate)
    accepted = as_samples(samples)
    size = max(int(block_s * source_rate), 1)
    for start in range(0, len(accepted), size):
        yield resampler.accept(accepted[start : start + size])
    yield resampler.finish()
