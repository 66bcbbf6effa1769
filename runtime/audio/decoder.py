"""Decodes strangers' files in a process of its own: what C libraries do with them ends there, as an error for one file.

`FileDecoder` is the side of the program, `main` that of the process. They exchange messages over its stdin and stdout.
The process has no file itself: it asks for the bytes that it reads, and is asked for each buffer of samples.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.files import has_media
from u2moe.runtime.audio.reading import read_blocks, stated_s
from u2moe.runtime.errors import AudioError, TruncatedAudioError

if TYPE_CHECKING:
    from u2moe.runtime.audio.files import Sound

_OPEN, _NEXT, _DATA = b"o", b"n", b"d"
"""Messages of the program: read another file, its next buffer, bytes of it."""
_READ, _LENGTH, _BUFFER, _ERROR, _TRUNCATED = b"r", b"l", b"b", b"e", b"t"
"""Messages of the process: bytes are wanted, the length by the header, samples (none at the end), and two errors."""
_HEAD, _PLACE, _SECONDS = struct.Struct("<cI"), struct.Struct("<QI"), struct.Struct("<d")
"""Kind and length of a message, place and number of bytes that are wanted, a length."""
_MOST_MESSAGE = 1 << 26
_READ_BYTES = 256 << 10
"""Bytes that are read of a file at once."""
_PATIENCE_S = 120.0
"""Seconds of waiting for a buffer: for systems without limits of processor time, and for whatever may stand still."""

_CPU_S, _CPU_SHARE = 5.0, 0.25
"""Seconds of processor time that decoding may take, and seconds more for each second of audio."""
_BUFFER_S = 10.0
_MEMORY = 512 << 20
"""Bytes of address space that a file may take."""
_DESCRIPTORS = 32
_NICENESS = 10
"""Beyond that of the thread that starts it: several may decode what takes long, beside work that is urgent."""
_MOST_CHANNELS = 64
_NO_MEMORY = 3
"""Exit status of a process that has no memory left."""
_CODE = f"import {__name__} as decoder; decoder.main()"
_KEPT = ("PYTHON", "PATH", "LD_", "DYLD_", "LANG", "LC_", "SYSTEM", "TEMP", "TMP")
"""What the process needs of the environment, by beginnings of names: others may be secrets."""


class DecoderError(AudioError):
    """A file ended the process that decoded it, or took more than it may; the next one gets another process."""

    kind = "decoder"


class _EndedError(Exception):
    """The other side has ended."""


class _Channel:
    """Messages over two pipes; raises _EndedError."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self._source, self._sink = source, sink

    def send(self, kind: bytes, content: bytes = b"") -> None:
        try:
            self._sink.write(_HEAD.pack(kind, len(content)))
            self._sink.write(content)
            self._sink.flush()
        except OSError as error:
            raise _EndedError from error

    def receive(self) -> tuple[bytes, bytes]:
        kind, length = _HEAD.unpack(self._read(_HEAD.size))
        return kind, self._read(length)

    def _read(self, length: int) -> bytes:
        data = self._source.read(length) if length <= _MOST_MESSAGE else b""
        if len(data) < length:
            raise _EndedError
        return data


class FileDecoder:
    """Decodes files one at a time, each in the same process while that lives; `stop` it at the end.

    The process has little memory, processor time and descriptors (where there is `resource`, which Windows lacks), and
    neither files, output nor secrets of this one. It starts with `start` or the first file, nicer than the thread.

    Attributes:
        stated_s: seconds that the header of the latest file states, once it has a buffer; 0: none.
    """

    def __init__(self) -> None:
        self.stated_s = 0.0
        self._num_reads = 0  # of the latest exchange
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._lock = threading.RLock()  # of whoever talks to the process

    def start(self) -> None:
        """Start the process unless it runs, without waiting for it; not while a file is decoded."""
        with self._lock:
            if (self._process is not None and self._process.poll() is None) or self._is_stopped:
                return
            self._release()
            environment = {name: value for name, value in os.environ.items() if name.upper().startswith(_KEPT)}
            environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
            command, pipe = [sys.executable, "-P", "-c", _CODE], subprocess.PIPE
            self._process = subprocess.Popen(  # noqa: S603 - this program
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment
            )

    def stop(self) -> None:
        """End the process; a file that it decodes ends with an error. From any thread."""
        self._is_stopped = True
        if (process := self._process) is not None:
            process.kill()  # whoever waits for it has the lock
        with self._lock:
            self._release()

    def read(self, file: IO[bytes], name: str, sample_rate: int) -> Iterator[npt.NDArray[np.float32]]:
        """Samples of a file at `sample_rate`, one channel, in buffers of about ten seconds; see `read_blocks`.

        Args:
            file: open for reading, can seek.
            name: its name in messages.
            sample_rate: sample rate of the buffers in Hz.

        Raises:
            AudioError: not audio, damaged, or with too many channels; names the file.
            TruncatedAudioError: the file is truncated; raised after its last samples.
            DecoderError: it crashed the process, or took too long or too much memory.
        """
        size = file.seek(0, os.SEEK_END)
        message = _OPEN, json.dumps({"name": name, "size": size, "sample_rate": sample_rate}).encode()
        while True:
            kind, content = self._ask(file, name, message)
            if kind in (_ERROR, _TRUNCATED):
                raise (AudioError if kind == _ERROR else TruncatedAudioError)(content.decode(errors="replace"))
            if not content:
                return
            yield np.frombuffer(content, np.float32)
            message = _NEXT, b""

    def _ask(self, file: IO[bytes], name: str, message: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        """The answer to a message. A process that ended before it read any of a file did so for another reason."""
        may_repeat = is_first = message[0] == _OPEN
        with self._lock:
            while True:
                try:
                    if is_first:
                        self.start()
                    return self._exchange(file, message)
                except BaseException as error:
                    self._release()  # it has ended, or waits for bytes that cannot be read
                    if not isinstance(error, _EndedError):
                        raise
                    if self._num_reads or not may_repeat:
                        raise DecoderError(f"{name}: cannot be decoded: {error}") from None
                    may_repeat = False

    def _exchange(self, file: IO[bytes], message: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        process, begin, self._num_reads = self._process, time.monotonic(), 0
        if process is None or process.stdin is None or process.stdout is None:
            raise _EndedError("the process that decodes files has ended")
        channel, timer = _Channel(process.stdout, process.stdin), threading.Timer(_PATIENCE_S, process.kill)
        timer.start()
        try:
            channel.send(*message)
            while True:
                kind, content = channel.receive()
                if kind == _READ:
                    self._num_reads += 1
                    position, length = _PLACE.unpack(content)
                    file.seek(position)
                    channel.send(_DATA, file.read(min(length, _MOST_MESSAGE)))
                elif kind == _LENGTH:
                    (self.stated_s,) = _SECONDS.unpack(content)
                else:
                    return kind, content
        except (_EndedError, struct.error):
            process.kill()
            is_late = time.monotonic() - begin >= _PATIENCE_S
            raise _EndedError("it takes too long" if is_late else _reason(process.wait())) from None
        finally:
            timer.cancel()

    def _release(self) -> None:
        """End the process, if there is one, and let go of its pipes."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _reason(code: int) -> str:
    """Why a process has ended with an exit status."""
    if code == _NO_MEMORY:
        return "it takes too much memory"
    if code == -getattr(signal, "SIGXCPU", 0):
        return "it takes too long"
    named = next((each.name for each in signal.Signals if each == -code), code)
    return f"it ended the process that decodes files ({named})"


# The rest runs in the process.


def main() -> None:
    """Answer messages until the program ends; it alone decides when, whatever signals its group gets."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    channel = _Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what libraries print is no message
    warnings.simplefilter("ignore")
    if sys.platform != "win32":
        os.nice(_NICENESS)
    _prepare()
    try:
        _answer(channel)
    except MemoryError:
        os._exit(_NO_MEMORY)
    except _EndedError:
        os._exit(0)


def _prepare() -> None:
    """Load all that decoding needs, then limit what a file may take."""
    import soundfile  # noqa: PLC0415 - only this process needs it here

    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(800), 8000, format="WAV")
    list(read_blocks(sound.getvalue(), 16_000))
    if has_media():
        import av  # noqa: F401, PLC0415 - an extra
    status = Path("/proc/self/statm")
    if status.exists():
        _limit("AS", int(status.read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MEMORY)
    for name, most in (("NOFILE", _DESCRIPTORS), ("FSIZE", 0), ("CORE", 0)):
        _limit(name, most)


def _limit(name: str, most: int) -> None:
    """Limit what the system gives this process, where it can; the limit for good stays, as that of time is raised."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - there is none on Windows

        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answer(channel: _Channel) -> None:
    buffers: Iterator[npt.NDArray[np.float32]] = iter(())
    while True:
        kind, content = channel.receive()
        if kind == _OPEN:
            buffers = _buffers(channel, **json.loads(content))
        try:
            buffer = next(buffers, np.zeros(0, np.float32))
        except AudioError as error:
            told = str(error).encode(errors="replace")
            channel.send(_TRUNCATED if isinstance(error, TruncatedAudioError) else _ERROR, told)
        else:
            channel.send(_BUFFER, buffer.astype(np.float32, copy=False).tobytes())


def _buffers(channel: _Channel, name: str, size: int, sample_rate: int) -> Iterator[npt.NDArray[np.float32]]:
    """The buffers of a file that are not empty, each within the processor time that it may take."""
    begin_s, num_samples = time.process_time(), 0

    def allow() -> None:
        _limit("CPU", math.ceil(begin_s + _CPU_S + _CPU_SHARE * (num_samples / sample_rate + _BUFFER_S)))

    def tell(sound: Sound) -> None:
        if sound.channels > _MOST_CHANNELS:
            raise AudioError(f"has {sound.channels} channels, expected at most {_MOST_CHANNELS}")
        channel.send(_LENGTH, _SECONDS.pack(stated_s(sound)))

    allow()
    file = io.BufferedReader(_RemoteFile(channel, name, size), _READ_BYTES)
    for buffer in read_blocks(file, sample_rate, _BUFFER_S, on_open=tell):
        num_samples += len(buffer)
        allow()
        if len(buffer):
            yield buffer


class _RemoteFile(io.RawIOBase):
    """A file whose bytes the program sends."""

    def __init__(self, channel: _Channel, name: str, size: int) -> None:
        self.name = name
        self._channel = channel
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError(f"cannot seek to {begin + offset}")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(self._size - self._position, 0))
        if not length:
            return 0
        self._channel.send(_READ, _PLACE.pack(self._position, length))
        _, data = self._channel.receive()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
