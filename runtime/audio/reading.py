"""Read any file as float32 samples of one channel at the model's sample rate, in buffers.

soundfile (libsndfile) reads WAV, FLAC, MP3, Ogg, AIFF and more, at any sample rate and channel count. PyAV, the extra
[media], reads the rest. The AudioDecoder of onnxruntime-extensions is not suitable: it does not report the sample rate,
cannot upsample, and decodes only whole files.
"""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from u2moe.runtime.audio.arrays import LOUDEST, Resampler, Samples, as_samples
from u2moe.runtime.audio.files import UNKNOWN_FRAMES, Sound, damage, name_of, open_audio
from u2moe.runtime.audio.media import MediaFile
from u2moe.runtime.audio.raw import File, RawAudio, RawFile
from u2moe.runtime.errors import AudioError, AudioWarning, TruncatedAudioError
from u2moe.runtime.log import log

_READ_S = 0.25  # Seconds read at once. If a file is damaged, at most this much intact audio is lost.
_MOST_BYTES = 1 << 24  # largest size of a buffer in bytes, for all channels together
_CANCELLED = 0.01  # if averaging leaves less than this share of the energy, the channels cancel each other


def read_blocks(
    file: File | RawAudio,
    sample_rate: int,
    block_s: float = 10.0,
    *,
    channel: int | None = None,
    track: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    on_open: Callable[[Sound], object] = lambda _: None,
) -> Iterator[Samples]:
    """Yield the audio of a file as mono samples at `sample_rate`, in buffers of about `block_s` seconds.

    Args:
        file: a path, the bytes of a file, a binary file object, or `RawAudio`. Raw audio is read as it arrives. Other
            audio from a pipe is first read to the end.
        sample_rate: sample rate of the buffers in Hz.
        block_s: seconds per buffer.
        channel: index of the channel to read, 0 for the left one. None: the average of all, with an AudioWarning if the
            channels cancel each other.
        track: index of the audio track of a media file, from 0; None: the default track.
        start: seconds to skip at the beginning of the file.
        end: time in the file, in seconds, at which to stop. None, or a time after the end: read to the end of the file.
        on_open: called with the open file before it is read. It may raise an AudioError to refuse the file.

    Raises:
        AudioError: the file is missing, damaged or not audio; its sample rate, the channel or the track is invalid; or
            there is no audio between `start` and `end`. The message names the file.
        TruncatedAudioError: the file is truncated, or parts of it are damaged; raised after its last samples.
    """
    import soundfile  # noqa: PLC0415 - programs that feed arrays do not need libsndfile

    name = name_of(file)
    with open_audio(file, track) as source:
        reader = type(source).__name__
        log("debug", "%s: %g Hz, channels: %d, read by %s", name, source.samplerate, source.channels, reader)
        try:
            on_open(source)
            resampler = Resampler(source.samplerate, sample_rate)
            mix = _mixer(name, source.channels, source.samplerate, channel)
            first, stop = _span(source, start, end)
            num_read = first
            last = sys.maxsize if isinstance(source, MediaFile) else source.frames  # other bytes may follow, as in FLAC
            size = max(min(int(block_s * source.samplerate), _MOST_BYTES // (4 * source.channels)), 1)
            error: Exception | None = None
            while error is None:
                buffer, error = _read_buffer(source, min(size, min(stop, last) - num_read))
                if not len(buffer):
                    break
                num_read += len(buffer)
                mixed, unusable = mix(buffer)
                error = unusable or error
                yield resampler.accept(mixed)
            if num_read == first > 0 and error is None:
                error = AudioError(f"has no audio from {start:g} s to its end")
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


def _read_buffer(source: Sound, size: int) -> tuple[Samples, Exception | None]:
    """Read up to `size` frames [frames, channels]; a pipe may yield fewer. Also return any error that ended reading."""
    parts = [np.zeros((0, source.channels), np.float32)]
    unit = max(int(_READ_S * source.samplerate), 1)
    while size > 0:
        asked = min(size, unit)
        try:
            parts.append(source.read(asked, dtype="float32", always_2d=True))
        except (RuntimeError, AudioError) as error:  # errors of soundfile are RuntimeErrors
            return np.concatenate(parts), error
        size -= len(parts[-1])
        if len(parts[-1]) < asked:
            break
    return np.concatenate(parts), None


def _span(source: Sound, start: float, end: float | None) -> tuple[int, int]:
    """Seek to `start`. Returns the first frame to read and the frame to stop before, which may be beyond the end."""
    first = round(start * source.samplerate)
    stop = sys.maxsize if end is None else round(end * source.samplerate)
    if first >= stop or (first > 0 and first >= source.frames):
        until, stated_s = "its end" if end is None else f"{end:g} s", source.frames / source.samplerate
        raise AudioError(f"has no audio from {start:g} s to {until}: it lasts {stated_s:g} s")
    if first and not isinstance(source, MediaFile | RawFile):
        with contextlib.suppress(RuntimeError):  # libsndfile cannot seek in some formats, such as GSM
            source.seek(first)
            return first, stop
    left = first
    while left > 0 and (skipped := source.read(min(left, math.ceil(source.samplerate)))).size:
        left -= len(skipped)
    return first, stop


def _mixer(
    name: str, num_channels: int, sample_rate: float, channel: int | None
) -> Callable[[Samples], tuple[Samples, AudioError | None]]:
    """Return a function that averages or selects channels. It warns if averaged channels begin to cancel each other."""
    if channel is not None and (not isinstance(channel, int) or isinstance(channel, bool)):
        raise AudioError(f"channel must be an integer, got {channel!r:.80}")
    if channel is not None and not 0 <= channel < num_channels:
        known = f"channels are counted from 0, and the file has {num_channels}"
        raise AudioError(f"channel {channel} does not exist: {known}")
    energies = np.zeros(2)  # of the average, and the average of the channels' energies

    def mix(buffer: Samples) -> tuple[Samples, AudioError | None]:
        """Mix frames [n, channels] to one channel. Return the samples before any invalid one, and the error or None."""
        is_chosen = channel is not None or num_channels == 1
        mixed = buffer[:, channel or 0] if is_chosen else buffer.mean(axis=1)
        unusable: AudioError | None = None
        try:
            mixed = as_samples(mixed)
        except AudioError as error:
            first = int(np.argmin(np.abs(mixed) <= LOUDEST))  # the comparison is also false for NaN
            intact = first - max(int(_READ_S * sample_rate), 1)
            mixed, unusable = as_samples(mixed[: max(intact, 0)]), error
        if not is_chosen:
            did_cancel, buffer = energies[0] < _CANCELLED * energies[1], buffer[: len(mixed)]
            energies[:] += (float(np.square(mixed).sum()), float(np.square(buffer).sum() / num_channels))
            if energies[0] < _CANCELLED * energies[1] and not did_cancel:
                message = "its channels cancel each other when averaged: choose one channel"
                warnings.warn(f"{name}: {message}", AudioWarning, stacklevel=2)
        return mixed, unusable

    return mix


def read_audio(
    file: File | RawAudio, sample_rate: int, *, channel: int | None = None, track: int | None = None
) -> Samples:
    """Return all samples of a file; see `read_blocks`. For a truncated file, warn and return the samples it has."""
    buffers = [np.zeros(0, np.float32)]
    try:
        buffers += read_blocks(file, sample_rate, channel=channel, track=track)
    except TruncatedAudioError as error:
        warnings.warn(str(error), AudioWarning, stacklevel=2)
    return np.concatenate(buffers)


def stated_s(sound: Sound) -> float:
    """Return the duration of an open file in seconds, as stated in its header; 0 if not stated."""
    return sound.frames / sound.samplerate if 0 < sound.frames < UNKNOWN_FRAMES and sound.samplerate > 0 else 0.0


def duration_of(file: str | os.PathLike[str] | IO[bytes]) -> float:
    """Return the duration of a file in seconds, as stated in its header; 0 if not stated.

    It is also 0 for pipes and unreadable files. An open file must be at its start, and is rewound.
    """
    try:
        if isinstance(file, str | os.PathLike) and not Path(file).is_file():
            return 0.0
        with open_audio(file) as sound:
            return stated_s(sound)
    except (AudioError, OSError, ValueError):
        return 0.0
    finally:
        if not isinstance(file, str | os.PathLike):
            file.seek(0)
