"""Decode untrusted files in a child process, so that a crash of a C library affects only one file.

`FileDecoder` runs in the program, `main` in the child process. They exchange messages over the child's stdin and
stdout. The child does not open files: it requests the bytes that it needs. The program requests each buffer of samples.
"""

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
from typing import IO

import numpy as np

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.files import Sound, has_media
from u2moe.runtime.audio.raw import FileView
from u2moe.runtime.audio.reading import read_blocks, stated_s
from u2moe.runtime.errors import AudioError, TruncatedAudioError

_OPEN, _NEXT, _DATA = b"o", b"n", b"d"
"""Messages of the program: open a file, request its next buffer of samples, send some of its bytes."""
_READ, _LENGTH, _BUFFER, _ERROR, _TRUNCATED = b"r", b"l", b"b", b"e", b"t"
"""Messages of the child: request for bytes, length stated in the header, samples (none: the end), error, truncation."""
_HEAD, _PLACE, _SECONDS = struct.Struct("<cI"), struct.Struct("<QI"), struct.Struct("<d")
"""Binary formats: head of a message (kind and length), requested bytes (position and number), length in seconds."""
_MOST_MESSAGE = 1 << 26
_READ_BYTES = 256 << 10  # bytes read from a file at once
_PATIENCE_S = 120.0
"""Maximum seconds to wait for a buffer. This limit also stops a child that hangs or has no CPU time limit."""

_CPU_S, _CPU_SHARE = 5.0, 0.25
"""Limit on the CPU time for decoding a file: a constant in seconds, plus a number of seconds per second of audio."""
_BUFFER_S = 10.0
_MEMORY = 512 << 20  # maximum address space for decoding a file, in bytes
_DESCRIPTORS = 32
_NICENESS = 10  # added to the niceness of the starting thread, because decoding is less urgent than other work
_MOST_CHANNELS = 64
_NO_MEMORY = 3  # exit status of a child that is out of memory
_CODE = f"import {__name__} as decoder; decoder.main()"
_KEPT = ("PYTHON", "PATH", "LD_", "DYLD_", "LANG", "LC_", "SYSTEM", "TEMP", "TMP")
"""Prefixes of environment variables that the child receives. Others may contain secrets."""


class DecoderError(AudioError):
    """A file made the decoder process crash or exceed its limits. The next file gets a new process."""

    kind = "decoder"


class _EndedError(Exception):
    """The process on the other side of the channel has ended."""


class _Channel:
    """Message channel over two pipes. Methods raise _EndedError if the other side has ended."""

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
    """Decodes files one at a time in a child process. Call `stop` at the end.

    The child has limited memory, CPU time and file descriptors, except on Windows. It has no access to the files,
    output or secrets of this process. It runs at a lower priority. `start` or the first file starts it. It decodes all
    files until it dies; the next file then starts a new child.

    Attributes:
        stated_s: seconds stated in the header of the latest file, known after its first buffer; 0: not stated.
    """

    def __init__(self) -> None:
        self.stated_s = 0.0
        self._num_reads = 0  # in the latest exchange
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._lock = threading.RLock()  # held while talking to the child

    def start(self) -> None:
        """Start the child if it is not running, without waiting for it. Do not call this while decoding."""
        with self._lock:
            if (self._process is not None and self._process.poll() is None) or self._is_stopped:
                return
            self._release()
            environment = {name: value for name, value in os.environ.items() if name.upper().startswith(_KEPT)}
            environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
            command, pipe = [sys.executable, "-P", "-c", _CODE], subprocess.PIPE
            self._process = subprocess.Popen(  # noqa: S603 - runs this program
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment
            )

    def stop(self) -> None:
        """Stop the child. Any decoding in progress fails. May be called from any thread."""
        self._is_stopped = True
        if (process := self._process) is not None:
            process.kill()  # before locking, because the thread that waits for the child holds the lock
        with self._lock:
            self._release()

    def read(self, file: IO[bytes], name: str, sample_rate: int) -> Iterator[Samples]:
        """Yield the samples of a file as one channel at `sample_rate` Hz, in buffers of ten seconds; see `read_blocks`.

        The file must be seekable. `name` is its name in messages. Raise AudioError if it is not audio, is damaged,
        or has too many channels; TruncatedAudioError, after the last samples, if it is truncated; and DecoderError if
        the child crashed, or decoding needed too much time or memory.
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
        """Send a message, and return the answer. If the child dies before it reads the file, try opening it again."""
        may_repeat = is_first = message[0] == _OPEN
        with self._lock:
            while True:
                try:
                    if is_first:
                        self.start()
                    return self._exchange(file, message)
                except BaseException as error:
                    self._release()  # the child has died, or waits for bytes that cannot be read
                    if not isinstance(error, _EndedError):
                        raise
                    if self._num_reads or not may_repeat:
                        raise DecoderError(f"{name}: cannot be decoded: {error}") from None
                    may_repeat = False

    def _exchange(self, file: IO[bytes], message: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        process, begin, self._num_reads = self._process, time.monotonic(), 0
        if process is None or process.stdin is None or process.stdout is None:
            raise _EndedError("the decoder process has ended")
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
            raise _EndedError("decoding takes too long" if is_late else _reason(process.wait())) from None
        finally:
            timer.cancel()

    def _release(self) -> None:
        """Kill the child if it exists, and close its pipes."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _reason(code: int) -> str:
    """Return why the child process ended with this exit status."""
    if code == _NO_MEMORY:
        return "decoding takes too much memory"
    if code == -getattr(signal, "SIGXCPU", 0):
        return "decoding takes too long"
    named = next((each.name for each in signal.Signals if each == -code), code)
    return f"the decoder process died ({named})"


# The code below runs in the child process.


def main() -> None:
    """Answer messages until the parent process ends. SIGINT, SIGTERM and SIGHUP are ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    channel = _Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # keep output of libraries out of the message channel
    warnings.simplefilter("ignore")
    if sys.platform != "win32":
        os.nice(_NICENESS)

    # Load everything that decoding needs, then set the resource limits.
    import soundfile  # noqa: PLC0415 - only the child needs it

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
    try:
        buffers: Iterator[Samples] = iter(())
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
    except MemoryError:
        os._exit(_NO_MEMORY)
    except _EndedError:
        os._exit(0)


def _limit(name: str, most: int) -> None:
    """Set a resource limit if the system supports it. The hard limit is kept, because the CPU limit is raised later."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - not available on Windows

        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _buffers(channel: _Channel, name: str, size: int, sample_rate: int) -> Iterator[Samples]:
    """Yield the non-empty buffers of a file. The limit on CPU time grows with the audio decoded."""
    begin_s, num_samples = time.process_time(), 0

    def allow() -> None:
        _limit("CPU", math.ceil(begin_s + _CPU_S + _CPU_SHARE * (num_samples / sample_rate + _BUFFER_S)))

    def tell(sound: Sound) -> None:
        if sound.channels > _MOST_CHANNELS:
            raise AudioError(f"has {sound.channels} channels, expected at most {_MOST_CHANNELS}")
        channel.send(_LENGTH, _SECONDS.pack(stated_s(sound)))

    def fetch(position: int, length: int) -> bytes:
        channel.send(_READ, _PLACE.pack(position, length))
        return channel.receive()[1]

    allow()
    view = FileView(fetch, size)
    view.name = name
    for buffer in read_blocks(io.BufferedReader(view, _READ_BYTES), sample_rate, _BUFFER_S, on_open=tell):
        num_samples += len(buffer)
        allow()
        if len(buffer):
            yield buffer
