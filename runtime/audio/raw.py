"""Raw audio: samples without a header, read as they arrive. Also named bytes, and files made of parts of others."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.errors import AudioError
from u2moe.runtime.validation import checked_choice, checked_number

File = str | os.PathLike[str] | bytes | IO[bytes]
"""An audio file: the path of a file or pipe, the content as bytes, or an open binary file object."""
ENCODINGS = {"s16le": ("<i2", 2.0**-15), "s32le": ("<i4", 2.0**-31), "f32le": ("<f4", 1.0)}
"""Element type and scale of each encoding, by the name that ffmpeg uses."""
_MOST_CHANNELS = 1024
_POLL_S = 0.01  # seconds between reads of an empty non-blocking pipe


@dataclass(frozen=True, kw_only=True)
class RawAudio:
    """Raw audio without a header, and its format.

    Attributes:
        file: a path, bytes, or a binary file object. Samples are read as they arrive.
        sample_rate: sample rate in Hz.
        encoding: `s16le`, `s32le` or `f32le` (little-endian integers or floats), named as in ffmpeg.
        num_channels: number of interleaved channels.

    Raises:
        ValueError: an argument is invalid.
    """

    file: File
    sample_rate: float
    encoding: str = "s16le"
    num_channels: int = 1

    def __post_init__(self) -> None:
        checked_choice("encoding", self.encoding, ENCODINGS)
        object.__setattr__(self, "sample_rate", checked_number("sample_rate", self.sample_rate, above=0, unit="Hz"))
        is_readable = isinstance(self.file, str | os.PathLike | bytes | bytearray | memoryview)
        if not (is_readable or hasattr(self.file, "read")):
            raise ValueError(f"file must be a path, bytes or a binary file object, got {self.file!r}")
        is_integer = isinstance(self.num_channels, int) and not isinstance(self.num_channels, bool)
        if not (is_integer and 1 <= self.num_channels <= _MOST_CHANNELS):
            raise ValueError(f"num_channels must be between 1 and {_MOST_CHANNELS}, got {self.num_channels!r}")

    def __str__(self) -> str:
        return str(self.file) if isinstance(self.file, str | os.PathLike) else "raw audio"

    @contextlib.contextmanager
    def open(self) -> Iterator[RawFile]:
        """Open the file. Raise AudioError if that is impossible; the message names the file."""
        with contextlib.ExitStack() as stack:
            stream: Any = self.file
            if isinstance(self.file, bytes | bytearray | memoryview):
                stream = io.BytesIO(self.file)
            elif isinstance(self.file, str | os.PathLike):
                try:
                    stream = stack.enter_context(Path(self.file).open("rb"))
                except (OSError, ValueError) as error:
                    raise AudioError(f"{self}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
            yield RawFile(self, stream)


class RawFile:
    """An open stream of raw audio, with the members of `soundfile.SoundFile` that `reading` uses."""

    def __init__(self, audio: RawAudio, stream: BinaryIO) -> None:
        self.samplerate = audio.sample_rate
        self.channels = audio.num_channels
        self.frames = sys.maxsize
        kind, self._scale = ENCODINGS[audio.encoding]
        self._kind = np.dtype(kind)
        self._stream: Any = stream
        self._rest = b""

    def read(self, size: int, **_: object) -> Samples:
        """Read up to `size` frames [frames, channels], as soon as one is available. Returns no frames at the end."""
        frame = self._kind.itemsize * self.channels
        content = self._rest
        while len(content) < frame and size > 0:
            more = self._read_some(size * frame - len(content))
            if not more:
                break
            content += more
        num_bytes = len(content) // frame * frame
        self._rest = content[num_bytes:]
        samples = np.frombuffer(content[:num_bytes], self._kind).reshape(-1, self.channels)
        with np.errstate(invalid="ignore"):  # values that are not numbers are an error later
            return samples.astype(np.float32) * np.float32(self._scale)

    def _read_some(self, num_bytes: int) -> bytes:
        """Wait until bytes are available, and read at most `num_bytes`. Returns no bytes at the end."""
        read = getattr(self._stream, "read1", self._stream.read)  # does not wait for all bytes
        more: bytes | None = read(num_bytes)
        if more is None or (not more and _is_non_blocking(self._stream)):
            read = getattr(self._stream, "raw", self._stream).read  # None: nothing yet; b"": the end
            while (more := read(num_bytes)) is None:
                time.sleep(_POLL_S)
        return more or b""

    def damage(self, _num_read: int) -> str | None:
        """Describe an incomplete sample at the end. Returns None if there is none."""
        return f"ends with {len(self._rest)} bytes of an incomplete sample: it is truncated" if self._rest else None


def _is_non_blocking(stream: Any) -> bool:
    """Return whether the stream is non-blocking, such as a pipe that a parent process has made non-blocking."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not a system file, closed, or Windows before 3.12
        return not os.get_blocking(stream.fileno())
    return False


class SoundBytes(io.BytesIO):
    """Content of a sound file that is not on disk, with a name for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


class FileView(io.RawIOBase):
    """A seekable file of `size` bytes. `read_at` returns bytes, given a position and a number of bytes to its end."""

    name: str

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self._read_at, self._size, self._position = read_at, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, and return it. Raise ValueError if it is negative."""
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"cannot seek to {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, and return the number of bytes; 0 at the end."""
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        content = self._read_at(self._position, length)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
