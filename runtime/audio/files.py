"""Open audio files, and find them in folders. Detects truncated and unfinished sound files."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import stat
import struct
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

from u2moe.runtime.audio.media import EXTRA, MediaFile
from u2moe.runtime.audio.raw import File, FileView, RawAudio, RawFile
from u2moe.runtime.errors import AudioError, AudioWarning

if TYPE_CHECKING:
    import soundfile

Sound: TypeAlias = "soundfile.SoundFile | MediaFile | RawFile"

MEDIA_SUFFIXES = (
    ".3gp", ".aac", ".ac3", ".amr", ".ape", ".avi", ".flv", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4",
    ".mpg", ".webm", ".wma", ".wmv",
)  # fmt: skip
"""Suffixes of recordings that PyAV reads and libsndfile does not."""
_MEDIA = re.compile(rb"(?s)....ftyp|\x1aE\xdf\xa3|0&\xb2u\x8ef\xcf\x11|#!AMR|\xff[\xf1\xf9]|FLV\x01|RIFF....AVI ")
"""First bytes of media files that PyAV reads and libsndfile does not."""


def has_media() -> bool:
    """Return whether the extra [media] is installed."""
    return importlib.util.find_spec("av") is not None


@contextlib.contextmanager
def open_audio(file: File | RawAudio, track: int | None = None) -> Iterator[Sound]:
    """Open an audio file; a pipe is first read to its end. `track` is an index; None: the default. Raise AudioError."""
    with contextlib.ExitStack() as stack:
        if isinstance(file, RawAudio):
            if track:
                raise AudioError(f"{file}: audio track {track} does not exist: raw audio has only track 0")
            yield stack.enter_context(file.open())
        else:
            yield _open(name_of(file), _readable(file, stack), track, stack)


def name_of(file: File | RawAudio) -> str:
    """Return the name by which messages refer to a file."""
    if isinstance(file, bytes | bytearray | memoryview):
        return f"{len(file)} bytes"
    if isinstance(file, str | os.PathLike | RawAudio):
        return str(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else f"a {type(file).__name__}"


def damage(sound: Sound, num_read: int) -> str | None:
    """Describe the damage to a file that ended after `num_read` frames. Returns None if it is intact."""
    if isinstance(sound, MediaFile | RawFile):
        return sound.damage(num_read)
    for stated, found in _STATED_SIZE.findall(sound.extra_info):
        if int(found) < int(stated) < _UNKNOWN_SIZE:
            return f"contains {found} of the {stated} bytes of audio stated in its header: it is truncated"
    missing_s = (sound.frames - num_read) / sound.samplerate
    if missing_s > 0.1 and sound.frames < UNKNOWN_FRAMES:  # an MP3 file may be a frame or two shorter
        stated_s = sound.frames / sound.samplerate
        return f"contains {stated_s - missing_s:.1f} of the {stated_s:.1f} s stated in its header: it is truncated"
    if sound.format == "OGG" and not _ends_with_last_ogg_page(sound.name):
        return "ends without the last page of its Ogg stream: it is truncated"
    return None


def _open(name: str, source: Path | BinaryIO, track: int | None, stack: contextlib.ExitStack) -> Sound:
    """Open a file with libsndfile if possible, otherwise with PyAV. `stack` closes it."""
    import soundfile  # noqa: PLC0415 - programs that feed arrays do not need libsndfile

    refused: Exception | None = None
    stream = stack.enter_context(_open_binary(source))
    if not track:
        try:
            sound = stack.enter_context(soundfile.SoundFile(source))
        except (soundfile.SoundFileError, TypeError, RuntimeError, OSError) as error:
            refused = error
        else:
            position = stream.tell()
            is_chain = sound.format in _FIRST_BYTES and _has_second(stream, _FIRST_BYTES[sound.format])
            if sound.format == "MP3":
                if (stated := _stated_in_mp3(stream)) is not None:
                    is_chain = _continues(stream, *stated)
                else:
                    try:
                        sound = stack.enter_context(soundfile.SoundFile(_unbounded(stream)))
                    except soundfile.SoundFileError:  # it begins within a frame, as recordings of broadcasts do
                        is_chain = True
            stream.seek(position)
            # If the file is seekable, soundfile seeks after each read. For MP3, libsndfile then decodes some frames
            # again, which takes nearly twice the time and prints errors to stderr.
            sound.seekable = lambda: False
            if not is_chain:
                return sound
    stream.seek(0)
    head = stream.read(16)
    stream.seek(0)
    if not head:
        raise AudioError(f"{name}: cannot be read as audio: it is empty")
    is_media = Path(name).suffix.lower() in MEDIA_SUFFIXES or _MEDIA.match(head) is not None
    try:
        return stack.enter_context(contextlib.closing(MediaFile(stream, track)))
    except ModuleNotFoundError as error:
        if is_media or refused is None:
            raise AudioError(f"{name}: needs the Python package av: {EXTRA}") from error
        raise AudioError(f"{name}: cannot be read as audio: {_reason(refused)}") from refused
    except AudioError as error:
        reason = error if is_media or refused is None else _reason(refused)
        raise AudioError(f"{name}: cannot be read as audio: {reason}") from error


def _has_second(stream: BinaryIO, first_bytes: bytes) -> bool:
    """Return whether a file is a concatenation of files. libsndfile would read only the first."""
    stream.seek(0)
    before, num_found = b"", 0
    while num_found < 2 and (block := stream.read(_LONGEST_HEADER)):
        num_found += (before + block).count(first_bytes)
        before = block[1 - len(first_bytes) :]
    return num_found > 1


def _stated_in_mp3(stream: BinaryIO) -> tuple[int, int] | None:
    """Return the offset of the first MP3 frame and the number of bytes stated in its Xing header; None: no header."""
    stream.seek(0)
    first = stream.read(10)
    size = sum(byte << 7 * place for place, byte in enumerate(first[:5:-1]))  # of an ID3 tag, perhaps with a picture
    start = stream.seek(10 + size if first.startswith(b"ID3") else 0)
    head = stream.read(_LONGEST_HEADER)
    for tag in re.finditer(b"Xing|Info", head):
        begin = head.rfind(b"\xff", 0, tag.start())
        flags, _, num_bytes = struct.unpack_from(">III", head + bytes(12), tag.end())
        if flags & 3 == 3 and tag.start() - begin in _XING_PLACES:
            return start + begin, num_bytes
    return None


def _continues(stream: BinaryIO, begin: int, num_bytes: int) -> bool:
    """Return whether another MP3 file follows the first one. libsndfile would read only the first."""
    stream.seek(begin)
    sync = stream.read(2)
    stream.seek(begin + num_bytes)
    following = stream.read(_ID3V1 + 3)
    following = following[_ID3V1:] if following.startswith(b"TAG") else following
    return following[:3] == b"ID3" or following[:2] == sync


def _unbounded(stream: BinaryIO) -> BinaryIO:
    """Return an MP3 file with a size that no file reaches, so that libsndfile reads it to its end.

    Without a Xing header, libsndfile estimates the length from the size and the bit rate of the first frames, and drops
    what is beyond the estimate. It also reads the last 128 bytes, which may be a tag. If the last frame is incomplete,
    zeros follow it, because libsndfile would fail.
    """

    def read_at(begin: int, length: int) -> bytes:
        if begin > _UNREACHED_SIZE // 2:
            return bytes(length)
        stream.seek(begin)
        content = stream.read(length)
        return content and content.ljust(length, b"\0")

    return cast("BinaryIO", FileView(read_at, _UNREACHED_SIZE))


def _reason(error: Exception) -> str:
    """Return the message of libsndfile without the name of the file."""
    return str(getattr(error, "error_string", error))


def _readable(file: File, stack: contextlib.ExitStack) -> Path | BinaryIO:
    """Return what soundfile can read: the path, or an open seekable file, which `stack` closes."""
    name = name_of(file)
    if isinstance(file, bytes | bytearray | memoryview):
        return repaired(io.BytesIO(file), name)
    if not isinstance(file, str | os.PathLike):
        try:
            memoryview(file.read(0))  # raises TypeError for a text file
            stream = cast("BinaryIO", file)
            can_seek = stream.seekable() and stream.tell() == 0
            return repaired(stream if can_seek else _copied(stream, stack), name)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise AudioError(f"{name}: cannot be read as a binary file: {error}") from error
    path = Path(file)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{path}: is a folder, expected a file")
        stream = stack.enter_context(path.open("rb"))
        source = repaired(stream if stat.S_ISREG(mode) else _copied(stream, stack), str(path))
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # soundfile refuses names that are not UTF-8
        return source
    return path if source is stream else source


def _copied(stream: BinaryIO, stack: contextlib.ExitStack) -> BinaryIO:
    """Return a temporary file with the rest of a stream."""
    copy = cast("BinaryIO", stack.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(stream, copy)
    copy.seek(0)
    return copy


def _open_binary(source: Path | BinaryIO) -> contextlib.AbstractContextManager[BinaryIO]:
    return source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)


_STATED_SIZE = re.compile(r"^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's log message about a WAV, AIFF, AU, W64 or RF64 file that is shorter than its header states."""
_UNKNOWN_SIZE = 0x7F000000  # longer ones mean "until the end"; programs that write to pipes state them
_UNREACHED_SIZE = 1 << 50
UNKNOWN_FRAMES = 1 << 48
"""A number of frames of at least this value means that the length is unknown."""
_LONGEST_HEADER = 1 << 20
_MOST_CHUNKS = 1000  # of a WAV file before its audio; libsndfile takes 30 s for 20 MB of empty chunks
_STATES_TOO_LITTLE = "its header states no audio or too little; perhaps the recorder crashed: it is read to its end"
_CHUNKS = {b"RIFF": "<4sI", b"RF64": "<4sI", b"FORM": ">4sI"}  # heads of chunks, by the start of WAV and AIFF files
_TAGS = (b"TAG", b"ID3", b"APET")
_ID3V1 = 128  # bytes of the tag after an MP3 file
_OGG_TAIL = 1 << 17  # Bytes at the end of an Ogg file that contain its last page. A page has at most 65307 bytes.
_OGG_HEADER = 27  # bytes of a page header before the segment lengths; the last is their number, the sixth has flags
_OGG_LAST_PAGE = 4
_FIRST_BYTES = {"OGG": b"OggS\0\2", "FLAC": b"fLaC\0\0\0\x22"}  # of a file, by libsndfile's name of its format
_XING_PLACES = (13, 21, 36)
"""Distances in bytes from the start of the first MP3 frame to the Xing header, for mono and stereo in MPEG 1 and 2."""


def repaired(stream: BinaryIO, name: str) -> BinaryIO:
    """Return the stream. If its header states too few bytes (`_unlimited`), warn and return a repaired view."""
    if (header := _unlimited(stream, name)) is not None:
        warnings.warn(f"{name}: {_STATES_TOO_LITTLE}", AudioWarning, stacklevel=2)
        stream = _with_header(stream, header)
    stream.seek(0)
    return stream


def _with_header(stream: BinaryIO, header: bytes) -> BinaryIO:
    """Return a view of a file in which `header` replaces the first bytes."""

    def read_at(begin: int, length: int) -> bytes:
        stream.seek(begin)
        content = stream.read(length)
        return header[begin : begin + length] + content[max(len(header) - begin, 0) :]

    return cast("BinaryIO", FileView(read_at, stream.seek(0, os.SEEK_END)))


def _unlimited(stream: BinaryIO, name: str) -> bytes | None:
    """Return a header that states no length, if more audio follows than the file's own states, else None."""
    # The length is 0 or too small if the recorder crashed. In WAV, it has too few bits for more than 4 GiB.
    num_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(_LONGEST_HEADER)
    if head[:4] == b".snd" and len(head) >= 12:
        return head[:8] + b"\xff" * 4 if sum(struct.unpack_from(">II", head, 4)) < num_bytes else None
    if (place := head.find(_FIRST_BYTES["FLAC"])) >= 0:
        return _unlimited_flac(stream, head[: place + 26])
    kind, position = _CHUNKS.get(head[:4]), 12
    for _ in range(_MOST_CHUNKS):
        if kind is None or position + 8 > len(head):
            return None
        chunk, size = struct.unpack_from(kind, head, position)
        if chunk in (b"data", b"SSND"):
            size = struct.unpack_from("<Q", head, 28)[0] if head[:4] == b"RF64" and len(head) > 36 else size
            end = position + 8 + size
            if any(_is_end(stream, kind, place, num_bytes) for place in (end, end + size % 2)):
                return None
            # libsndfile then reads to the end, also beyond 4 GiB
            return (b"RIFF" if chunk == b"data" else b"FORM") + b"\x08\0\0\0" + head[8 : position + 4] + bytes(4)
        position += 8 + size + size % 2
    raise AudioError(f"{name}: has more than {_MOST_CHUNKS} chunks before its audio")


def _unlimited_flac(stream: BinaryIO, head: bytes) -> bytes | None:
    """Return the start of a FLAC file without its length (the last 36 bits) if there are more samples, else None."""
    import soundfile  # noqa: PLC0415 - programs that feed arrays do not need libsndfile

    header = head[:-5] + bytes([head[-5] & 0xF0]) + bytes(4)
    with contextlib.suppress(soundfile.SoundFileError), soundfile.SoundFile(_with_header(stream, header)) as sound:
        sound.seek(stated := int.from_bytes(head[-5:], "big") & (1 << 36) - 1)
        return header if stated else None
    return None


def _is_end(stream: BinaryIO, kind: str, place: int, num_bytes: int) -> bool:
    """Return whether the audio of a WAV or AIFF file ends at this position: there is a chunk, a tag or less."""
    stream.seek(min(place, num_bytes))
    if len(head := stream.read(8)) < 8 or head.startswith(_TAGS):
        return True
    chunk, size = struct.unpack(kind, head)
    return re.fullmatch(rb"[ -~]{4}", chunk) is not None and chunk not in _CHUNKS and place + 8 + size <= num_bytes


def _ends_with_last_ogg_page(file: str | os.PathLike[str] | BinaryIO) -> bool:
    """Return whether the last page of an Ogg file is complete and marked as the last. Moves the file position."""
    with _open_binary(Path(file) if isinstance(file, str | os.PathLike) else file) as stream:
        stream.seek(max(stream.seek(0, os.SEEK_END) - _OGG_TAIL, 0))
        tail = stream.read()
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    if len(page) < _OGG_HEADER or not page[5] & _OGG_LAST_PAGE:
        return False
    return len(page) >= _OGG_HEADER + page[26] + sum(page[_OGG_HEADER : _OGG_HEADER + page[26]])


FILE_SUFFIXES = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav")
"""Suffixes of the files that a folder search takes for audio."""
APPLE_DOUBLE = "._"  # prefix of metadata files of macOS, which have the suffix of an audio file but contain no audio
_MOST_NAMED = 5


def find_audio(paths: list[Path]) -> list[Path]:
    """Return `paths`, each folder replaced by its sorted audio files. Raises AudioError; warns of unreadable ones."""
    found: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, it never raises
            found.append(path)
            continue
        inside, passed_over = _search(path)
        if passed_over:
            named = ", ".join(str(file) for file in passed_over[:_MOST_NAMED])
            more = f" and {len(passed_over) - _MOST_NAMED} more" if len(passed_over) > _MOST_NAMED else ""
            needs = f" (media files need: {EXTRA})" if any(_is_media(file) for file in passed_over) else ""
            warnings.warn(f"{path}: cannot read {named}{more}{needs}", AudioWarning, stacklevel=2)
        if not inside:
            raise AudioError(f"{path}: contains no audio files")
        found += inside
    return found


def _search(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the audio files below a folder, and the files and folders that cannot be read."""
    inside: list[Path] = []
    passed_over: list[Path] = []
    seen = {os.path.realpath(folder)}
    walk = os.walk(folder, onerror=lambda error: passed_over.append(Path(error.filename)), followlinks=True)
    for place, folders, names in walk:
        # Search each folder once, even if symbolic links form a cycle.
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
