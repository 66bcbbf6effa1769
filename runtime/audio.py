"""Any file or array to mono float32 samples at the model's rate.

Files are read with soundfile (libsndfile: WAV, FLAC, MP3, Ogg, AIFF and more, at any rate and channel count), not with
onnxruntime-extensions' AudioDecoder operator: that one does not tell the sample rate, cannot raise it, and decodes a
file only as a whole, so that an hour of audio would have to fit into memory. Rates are changed with soxr, whose stream
gives the same samples to the last bit for any split, and exactly as many as the ratio of rates says.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import soxr

from u2moe.runtime.errors import AudioError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

FILE_SUFFIXES = (".aif", ".aiff", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav")
"""Suffixes of files that are taken for audio when a folder is searched."""

_LOWEST_RATE = 1000
_HIGHEST_RATE = 384_000
_LOUDEST = 8.0
"""Floats may overshoot 1 (resampled or decoded audio does), but this is integers taken for floats."""


def as_samples(samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """One channel as float32 [n] in [-1, 1]; int16 is scaled.

    Raises:
        AudioError: more than one axis, another element type, NaN or infinity, or values far outside [-1, 1].
    """
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
    if loudest > _LOUDEST:
        raise AudioError(f"samples reach {loudest:g}, expected floats in [-1, 1]: divide by the largest integer first")
    return array.astype(np.float32)


class Resampler:
    """Samples of one channel at one rate, in any portions, to another rate: any split gives the same samples.

    Raises:
        AudioError: a rate that is no sample rate.
    """

    def __init__(self, source_rate: float, target_rate: int) -> None:
        if not _LOWEST_RATE <= source_rate <= _HIGHEST_RATE:
            raise AudioError(f"sample rate must be between {_LOWEST_RATE} and {_HIGHEST_RATE} Hz, got {source_rate}")
        self.source_rate = source_rate
        self.target_rate = target_rate
        self._stream = (
            soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality="HQ")
            if source_rate != target_rate
            else None
        )

    def accept(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Samples at the target rate that are known so far; some are held back for the filter."""
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


def convert(
    samples: npt.ArrayLike, source_rate: float, sample_rate: int, block_s: float = 10.0
) -> Iterator[npt.NDArray[np.float32]]:
    """Samples of one channel at `sample_rate`, in blocks of about `block_s` seconds.

    Raises:
        AudioError: samples or rate that cannot be used; before there is a block.
    """
    resampler = Resampler(source_rate, sample_rate)
    accepted = as_samples(samples)
    size = max(int(block_s * source_rate), 1)
    for start in range(0, len(accepted), size):
        yield resampler.accept(accepted[start : start + size])
    yield resampler.finish()


def read_blocks(
    path: str | os.PathLike[str], sample_rate: int, block_s: float = 10.0
) -> Iterator[npt.NDArray[np.float32]]:
    """Samples of a file at `sample_rate`, channels mixed, in blocks of about `block_s` seconds.

    Raises:
        AudioError: no such file, not audio, damaged, or of an impossible rate; names the file.
    """
    import soundfile  # noqa: PLC0415 - programs that feed arrays need no libsndfile

    file = Path(path)
    if not file.is_file():
        raise AudioError(f"{file}: no such file")
    try:
        with soundfile.SoundFile(file) as source:
            resampler = Resampler(source.samplerate, sample_rate)
            size = max(int(block_s * source.samplerate), 1)
            while len(block := source.read(size, dtype="float32", always_2d=True)):
                yield resampler.accept(as_samples(block.mean(axis=1)))
            yield resampler.finish()
    except (soundfile.SoundFileError, TypeError, RuntimeError, OSError) as error:
        raise AudioError(f"{file}: cannot be read as audio: {error}") from error
    except AudioError as error:
        raise AudioError(f"{file}: {error}") from error


def read_audio(path: str | os.PathLike[str], sample_rate: int) -> npt.NDArray[np.float32]:
    """All samples of a file; see `read_blocks`."""
    return np.concatenate([np.zeros(0, np.float32), *read_blocks(path, sample_rate)])


def duration_of(path: str | os.PathLike[str]) -> float:
    """Seconds of a file by its header; 0 where that cannot be read."""
    import soundfile  # noqa: PLC0415

    try:
        info = soundfile.info(Path(path))
    except (soundfile.SoundFileError, TypeError, RuntimeError, OSError):
        return 0.0
    return info.frames / info.samplerate if info.samplerate > 0 else 0.0


def find_audio(paths: list[Path]) -> list[Path]:
    """Files as given, and the audio files below every folder, sorted by name.

    Raises:
        AudioError: a folder without audio files.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in FILE_SUFFIXES and file.is_file())
        if not inside:
            raise AudioError(f"{path}: holds no audio files")
        found += inside
    return found
