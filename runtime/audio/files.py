"""Opens audio from a path, bytes, a file object or raw samples, with libsndfile or else with PyAV."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

from u2moe.runtime.audio.media import EXTRA, MediaFile
from u2moe.runtime.audio.raw import File, RawAudio, RawFile
from u2moe.runtime.audio.sound_file import SoundBytes, cut_off, repaired
from u2moe.runtime.errors import AudioError

if TYPE_CHECKING:
    import soundfile

    Sound: TypeAlias = soundfile.SoundFile | MediaFile | RawFile

MEDIA_SUFFIXES = (
    ".3gp", ".aac", ".ac3", ".amr", ".ape", ".avi", ".flv", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4",
    ".mpg", ".webm", ".wma", ".wmv",
)  # fmt: skip
"""Suffixes of recordings that PyAV reads and libsndfile does not."""
_MEDIA = re.compile(
    rb"....ftyp|\x1aE\xdf\xa3|0&\xb2u\x8ef\xcf\x11|#!AMR|\xff[\xf1\xf9]|FLV\x01|RIFF....AVI ", re.DOTALL
)
"""First bytes of media files that PyAV reads and libsndfile does not."""


def has_media() -> bool:
    """Whether the extra [media] is installed."""
    return importlib.util.find_spec("av") is not None


@contextlib.contextmanager
def open_audio(file: File | RawAudio, track: int | None = None) -> Iterator[Sound]:
    """Open an audio file for reading. A pipe is first read to its end, unless it is raw audio.

    Args:
        file: a path, bytes, a binary file object, or raw audio.
        track: index among the audio tracks of a media file, counted from 0; None: the default one.

    Raises:
        AudioError: missing, unreadable, not audio, or without such a track; names the file.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, RawAudio):
            if track:
                raise AudioError(f"{file}: there is no audio track {track}: raw audio has one")
            yield stack.enter_context(file.open())
        else:
            yield stack.enter_context(_open(name_of(file), stack.enter_context(_readable(file)), track))


def name_of(file: File | RawAudio) -> str:
    """The name of a file in messages."""
    if isinstance(file, bytes | bytearray | memoryview):
        return f"{len(file)} bytes"
    if isinstance(file, str | os.PathLike | SoundBytes | RawAudio):
        return str(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else f"a {type(file).__name__}"


def damage(sound: Sound, num_read: int) -> str | None:
    """Evidence that a file, read to its end with `num_read` frames, is damaged or cut off; None if there is none."""
    return sound.damage(num_read) if isinstance(sound, MediaFile | RawFile) else cut_off(sound, num_read)


@contextlib.contextmanager
def _open(name: str, source: Path | BinaryIO, track: int | None) -> Iterator[Sound]:
    """With libsndfile if it can, otherwise with PyAV."""
    import soundfile  # noqa: PLC0415 - programs that feed arrays need no libsndfile

    refused: Exception | None = None
    if not track:
        try:
            sound = soundfile.SoundFile(source)
        except (soundfile.SoundFileError, TypeError, RuntimeError, OSError) as error:
            refused = error
        else:
            # Otherwise soundfile seeks after each read, and libsndfile then decodes some of an MP3 file again: nearly
            # twice the time, and complaints on stderr about the frames before that.
            sound.seekable = lambda: False
            with sound:
                yield sound
            return
    with _open_binary(source) as stream:
        stream.seek(0)
        head = stream.read(16)
        stream.seek(0)
        if not head:
            raise AudioError(f"{name}: cannot be read as audio: it is empty")
        is_media = Path(name).suffix.lower() in MEDIA_SUFFIXES or _MEDIA.match(head) is not None
        try:
            media = MediaFile(stream, track)
        except ModuleNotFoundError as error:
            if is_media or refused is None:
                raise AudioError(f"{name}: needs the Python package av: {EXTRA}") from error
            raise AudioError(f"{name}: cannot be read as audio: {_reason(refused)}") from refused
        except AudioError as error:
            reason = error if is_media or refused is None else _reason(refused)
            raise AudioError(f"{name}: cannot be read as audio: {reason}") from error
        with contextlib.closing(media):
            yield media


def _reason(error: Exception) -> str:
    """The message of libsndfile without the name of the file."""
    return str(getattr(error, "error_string", error))


@contextlib.contextmanager
def _readable(file: File) -> Iterator[Any]:
    """The path, or an open seekable file, for soundfile."""
    name = name_of(file)
    with contextlib.ExitStack() as stack:
        if isinstance(file, bytes | bytearray | memoryview):
            yield repaired(io.BytesIO(file), name)
            return
        if isinstance(file, str | os.PathLike):
            yield _readable_path(Path(file), stack)
            return
        try:
            memoryview(file.read(0))  # a file of text is a TypeError
            stream = cast("BinaryIO", file)
            can_seek = stream.seekable() and stream.tell() == 0
            source = repaired(stream if can_seek else _copied(stream, stack), name)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise AudioError(f"{name}: cannot be read: expected an open binary file: {error}") from error
        yield source


def _readable_path(file: Path, stack: contextlib.ExitStack) -> Path | BinaryIO:
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{file}: is a folder, expected a file")
        stream = stack.enter_context(file.open("rb"))
        source = repaired(stream if stat.S_ISREG(mode) else _copied(stream, stack), str(file))
    except FileNotFoundError:
        raise AudioError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        os.fspath(file).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8, which soundfile refuses
        return source
    return file if source is stream else source


def _copied(stream: BinaryIO, stack: contextlib.ExitStack) -> BinaryIO:
    """A temporary file with the rest of a stream."""
    copy = cast("BinaryIO", stack.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(stream, copy)
    copy.seek(0)
    return copy


@contextlib.contextmanager
def _open_binary(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield stream
    else:
        yield source
