"""Converts any file or array to mono float32 samples at the model's sample rate.

Files are read with soundfile (libsndfile: WAV, FLAC, MP3, Ogg, AIFF and more, at any rate and channel count) or, where
it cannot and the extra [media] is installed, with PyAV; not with onnxruntime-extensions' AudioDecoder operator, which
does not report the sample rate, cannot upsample, and decodes a file only as a whole, so that an hour of audio would
have to fit into memory. Resampling uses soxr, whose stream gives the same samples to the last bit for any split, and
exactly the number of samples given by the ratio of the rates; where it has no wheel, `resampling` takes its place.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio_file import MEDIA_SUFFIXES, File, damage, has_media, name_of, open_audio
from u2moe.runtime.errors import AudioError, AudioWarning, TruncatedAudioError
from u2moe.runtime.log import log_debug
from u2moe.runtime.media_file import EXTRA
from u2moe.runtime.resampling import SincResampler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from u2moe.runtime.audio_file import Sound
    from u2moe.runtime.raw_audio import RawAudio

FILE_SUFFIXES = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav")
"""Suffixes of files that count as audio when a folder is searched."""
APPLE_DOUBLE = "._"
"""How files begin that macOS writes beside others on foreign disks, with their suffixes: they hold no audio."""

_READ_S = 0.25
"""Seconds that are read at once: so much is lost before damage."""
_CANCELLED = 0.01
"""If averaging leaves less than this share of the energy, the channels cancel each other."""
_MOST_NAMED = 5
_LOWEST_RATE = 1000
_HIGHEST_RATE = 384_000
_LOUDEST = 8.0
"""Floats may exceed 1 (after resampling or decoding), but beyond this they are unscaled integers."""


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
    if loudest > _LOUDEST:
        raise AudioError(f"samples reach {loudest:g}, expected floats in [-1, 1]: divide by the largest integer first")
    return array.astype(np.float32)


class Resampler:
    """Resamples one channel incrementally: any split gives the same samples.

    Raises:
        AudioError: an invalid sample rate.
    """

    def __init__(self, source_rate: float, target_rate: int) -> None:
        is_number = isinstance(source_rate, int | float | np.integer | np.floating)
        if not is_number or isinstance(source_rate, bool):
            raise AudioError(f"sample rate must be a number of Hz, got {source_rate!r:.80}")
        if not _LOWEST_RATE <= source_rate <= _HIGHEST_RATE:
            raise AudioError(f"sample rate must be between {_LOWEST_RATE} and {_HIGHEST_RATE} Hz, got {source_rate}")
        self.source_rate = source_rate
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
    """What resamples: soxr, or our own where soxr is not installed, because it has no wheel for the system."""
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


def read_blocks(
    file: File | RawAudio,
    sample_rate: int,
    block_s: float = 10.0,
    *,
    channel: int | None = None,
    track: int | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """Samples of a file at `sample_rate`, one channel, in blocks of about `block_s` seconds.

    Args:
        file: a path, the bytes of a file, a binary file object, or `RawAudio`, which is read as it comes. What cannot
            seek (pipes) is first read to its end, unless it is raw.
        sample_rate: sample rate of the blocks in Hz.
        block_s: seconds per block.
        channel: index of the only channel to read, 0 for the left one; None: the average of all. If the channels cancel
            each other in the average, there is an AudioWarning.
        track: index among the audio tracks of a media file, counted from 0; None: the default one.
        start: seconds of the file to skip.
        end: seconds into the file at which to stop; None, or beyond its end: the end.

    Raises:
        AudioError: no such file, not audio, damaged, an invalid rate, no such channel or track, or nothing between
            `start` and `end`; names the file.
        TruncatedAudioError: the file is truncated, or parts of it are damaged; raised after its last samples.
    """
    import soundfile  # noqa: PLC0415 - programs that feed arrays need no libsndfile

    name = name_of(file)
    with open_audio(file, track) as source:
        log_debug(
            "%s: %g Hz, channels: %d, read by %s", name, source.samplerate, source.channels, type(source).__name__
        )
        try:
            resampler = Resampler(source.samplerate, sample_rate)
            mixer = _Mixer(name, source.channels, source.samplerate, channel)
            num_read, stop = _span(source, start, end)
            size = max(int(block_s * source.samplerate), 1)
            error: Exception | None = None
            while error is None:
                block, error = _read_block(source, min(size, stop - num_read))
                if not len(block):
                    break
                num_read += len(block)
                mixed, unusable = mixer.mix(block)
                error = unusable or error
                yield resampler.accept(mixed)
            if error is not None:
                raise error
            yield resampler.finish()
            missing = damage(source, num_read) if num_read < stop else None
        except (soundfile.SoundFileError, TypeError, RuntimeError, OSError) as error:
            raise AudioError(f"{name}: cannot be read as audio: {error}") from error
        except AudioError as error:
            raise AudioError(f"{name}: {error}") from error
    if missing is not None:
        raise TruncatedAudioError(f"{name}: {missing}")


def _read_block(source: Sound, size: int) -> tuple[npt.NDArray[np.float32], Exception | None]:
    """Up to `size` frames [frames, channels], at once what a pipe has; and the error at which the file breaks off."""
    parts = [np.zeros((0, source.channels), np.float32)]
    unit = max(int(_READ_S * source.samplerate), 1)
    while size > 0:
        asked = min(size, unit)
        try:
            parts.append(source.read(asked, dtype="float32", always_2d=True))
        except (RuntimeError, AudioError) as error:  # soundfile's are RuntimeError
            return np.concatenate(parts), error
        size -= len(parts[-1])
        if len(parts[-1]) < asked:
            break
    return np.concatenate(parts), None


def _span(source: Sound, start: float, end: float | None) -> tuple[int, int]:
    """The first frame to read, to which the file is moved, and the one to stop before, which may be beyond its end."""
    first = round(start * source.samplerate)
    stop = sys.maxsize if end is None else round(end * source.samplerate)
    if first >= stop or (first > 0 and first >= source.frames):
        stated_s = source.frames / source.samplerate
        raise AudioError(
            f"has no audio from {start:g} s to {'its end' if end is None else f'{end:g} s'}: it lasts {stated_s:g} s"
        )
    if first:
        source.seek(first)
    return first, stop


class _Mixer:
    """Mixes channels to one, and detects whether they cancel each other."""

    def __init__(self, name: str, num_channels: int, sample_rate: float, channel: int | None) -> None:
        if channel is not None and (not isinstance(channel, int) or isinstance(channel, bool)):
            raise AudioError(f"channel must be a number, got {channel!r:.80}")
        if channel is not None and not 0 <= channel < num_channels:
            raise AudioError(f"there is no channel {channel}: it has {num_channels}, counted from 0")
        self._name = name
        self._channel = channel
        self._unit = max(int(_READ_S * sample_rate), 1)
        self._energies = np.zeros(2)
        """Energy of the average, and average energy of the channels."""

    def mix(self, block: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], AudioError | None]:
        """One channel [n] from frames [n, channels], up to what cannot be used; and the error about that."""
        is_chosen = self._channel is not None or block.shape[1] == 1
        mixed, error = self._usable(block[:, self._channel or 0] if is_chosen else block.mean(axis=1))
        if not is_chosen:
            self._look_for_cancelling(mixed, block[: len(mixed)])
        return mixed, error

    def _usable(self, samples: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], AudioError | None]:
        try:
            return as_samples(samples), None
        except AudioError as error:
            first = int(np.argmin(np.abs(samples) <= _LOUDEST))  # NaN is not, either
            return as_samples(samples[: max(first - self._unit, 0)]), error

    def _look_for_cancelling(self, mixed: npt.NDArray[np.float32], block: npt.NDArray[np.float32]) -> None:
        before = self._cancels
        self._energies += (float(np.square(mixed).sum()), float(np.square(block).sum() / block.shape[1]))
        if self._cancels and not before:
            warnings.warn(
                f"{self._name}: its channels cancel each other when averaged: choose one channel",
                AudioWarning,
                stacklevel=2,
            )

    @property
    def _cancels(self) -> bool:
        return bool(self._energies[0] < _CANCELLED * self._energies[1])


def read_audio(
    file: File | RawAudio, sample_rate: int, *, channel: int | None = None, track: int | None = None
) -> npt.NDArray[np.float32]:
    """All samples of a file, or with an AudioWarning those of a truncated file; see `read_blocks`."""
    blocks = [np.zeros(0, np.float32)]
    try:
        blocks += read_blocks(file, sample_rate, channel=channel, track=track)
    except TruncatedAudioError as error:
        warnings.warn(str(error), AudioWarning, stacklevel=2)
    return np.concatenate(blocks)


def duration_of(path: str | os.PathLike[str]) -> float:
    """Duration of a file in seconds by its header; 0 if unreadable or not stated, and for pipes."""
    try:
        if not Path(path).is_file():
            return 0.0
        with open_audio(path) as sound:
            return sound.frames / sound.samplerate if 0 < sound.frames < sys.maxsize and sound.samplerate > 0 else 0.0
    except (AudioError, OSError, ValueError):
        return 0.0


def find_audio(paths: list[Path]) -> list[Path]:
    """Files as given, and the audio files below every folder, sorted by name.

    An AudioWarning names recordings that need the extra [media], and folders that cannot be read.

    Raises:
        AudioError: a folder has no audio files.
    """
    found: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir it raises for no name
            found.append(path)
            continue
        inside, passed_over = _search(path)
        if passed_over:
            named = ", ".join(str(file) for file in passed_over[:_MOST_NAMED])
            more = f" and {len(passed_over) - _MOST_NAMED} more" if len(passed_over) > _MOST_NAMED else ""
            needs = f" (media files need: {EXTRA})" if any(_is_media(file) for file in passed_over) else ""
            warnings.warn(f"{path}: cannot read {named}{more}{needs}", AudioWarning, stacklevel=2)
        if not inside:
            raise AudioError(f"{path}: holds no audio files")
        found += inside
    return found


def _search(folder: Path) -> tuple[list[Path], list[Path]]:
    """Audio files below a folder, and files and folders that cannot be read."""
    inside: list[Path] = []
    passed_over: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(
        folder, onerror=lambda error: passed_over.append(Path(error.filename)), followlinks=True
    ):
        # A folder is searched once, even if links to it form a circle.
        targets = {os.path.realpath(Path(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for target, name in targets.items() if target not in seen)
        seen.update(targets)
        for file in (Path(place, name) for name in names if not name.startswith(APPLE_DOUBLE)):
            if file.suffix.lower() in FILE_SUFFIXES or (_is_media(file) and has_media()):
                inside.append(file)
            elif _is_media(file):
                passed_over.append(file)
    return sorted(inside), sorted(passed_over)


def _is_media(file: Path) -> bool:
    return file.suffix.lower() in MEDIA_SUFFIXES
