"""Detects truncated and unfinished sound files, which libsndfile does not report."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from u2moe.runtime.errors import AudioWarning

if TYPE_CHECKING:
    import soundfile

_STATED_SIZE = re.compile(r"^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's log message about a WAV, AIFF, AU, W64 or RF64 file that is shorter than its header states."""
_UNKNOWN_SIZE = 0x7FFF0000
"""Lengths from this value on mean "until the end", as written by programs that write to pipes."""
_LONGEST_HEADER = 1 << 20
_OGG_TAIL = 1 << 17
"""Bytes at the end of an Ogg file that contain its last page, which has at most 65307."""
_OGG_HEADER = 27
"""Bytes of a page header before the segment lengths; the last is their number, the sixth holds flags."""
_OGG_LAST_PAGE = 4


class SoundBytes(io.BytesIO):
    """The bytes of a sound file that is not on a disk, with a name for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name


def cut_off(sound: soundfile.SoundFile, num_read: int) -> str | None:
    """Evidence that a file, read to its end with `num_read` frames, is truncated; None if there is none."""
    for stated, found in _STATED_SIZE.findall(sound.extra_info):
        if int(found) < int(stated) < _UNKNOWN_SIZE:
            return f"holds {found} of the {stated} bytes of audio that its header states: it was cut off"
    missing_s = (sound.frames - num_read) / sound.samplerate
    if missing_s > 0.1:  # an MP3 file may be a frame or two shorter
        stated_s = sound.frames / sound.samplerate
        return f"holds {stated_s - missing_s:.1f} of the {stated_s:.1f} s that its header states: it was cut off"
    if sound.format == "OGG" and not _ends_with_last_ogg_page(sound.name):
        return "ends without the last page of its Ogg stream: it was cut off"
    return None


def repaired(stream: BinaryIO, name: str) -> BinaryIO:
    """The stream or, with a warning, one with a repaired header if its header states no audio."""
    position = _unfinished(stream)
    if position is None:
        return stream
    warnings.warn(
        f"{name}: its header states no audio, as where a recorder crashed: read to the end of the file",
        AudioWarning,
        stacklevel=2,
    )
    return cast("BinaryIO", _Repaired(stream, position))


def _unfinished(stream: BinaryIO) -> int | None:
    """Position of the audio length in a WAV file that states 0 although audio follows; None for other files."""
    head = stream.read(_LONGEST_HEADER)
    stream.seek(0)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    position = 12
    while position + 8 <= len(head):
        name, size = head[position : position + 4], int(struct.unpack_from("<I", head, position + 4)[0])
        if name == b"data":
            following = head[position + 8 : position + 12]
            is_chunk = following.isalnum() or following in (b"id3 ", b"cue ")
            return position + 4 if size == 0 and len(following) == 4 and not is_chunk else None
        position += 8 + size + size % 2
    return None


class _Repaired(io.RawIOBase):
    """A WAV file as if its header stated that the audio continues to the end of the file."""

    def __init__(self, stream: BinaryIO, position: int) -> None:
        self._stream = stream
        self._position = position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        begin = self._stream.tell()
        content = bytearray(self._stream.read(len(buffer)))
        for index in range(max(self._position, begin), min(self._position + 4, begin + len(content))):
            content[index - begin] = 0xFF
        buffer[: len(content)] = content
        return len(content)


def _ends_with_last_ogg_page(file: str | os.PathLike[str] | BinaryIO) -> bool:
    """Whether the last page of an Ogg file is whole and marked as the last; it has been read to its end."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(Path(file).open("rb")) if isinstance(file, str | os.PathLike) else file
        stream.seek(max(stream.seek(0, os.SEEK_END) - _OGG_TAIL, 0))
        tail = stream.read()
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    if len(page) < _OGG_HEADER or not page[5] & _OGG_LAST_PAGE:
        return False
    lengths = page[_OGG_HEADER : _OGG_HEADER + page[26]]
    return len(lengths) == page[26] and len(page) >= _OGG_HEADER + len(lengths) + sum(lengths)
