"""Reading the audio of entries from files, URLs, tar archives and commands."""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Self

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.files import SoundBytes
from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.corpus.entry import AudioBytes, AudioFile, AudioSource, Command, Entry, TarMember, Unreadable
from u2moe.runtime.corpus.storage import is_url, open_binary
from u2moe.runtime.errors import AudioError
from u2moe.runtime.text.lines import decompressed

_LONGEST_COMPLAINT = 200
_MOST_BYTES = 4 << 30
"""Maximum bytes of a recording that is copied into memory. A larger recording must be a local file."""
LONGEST_COMMAND_S = 600.0
"""Timeout of a command in seconds. A command that hangs must not stop the run."""


class Sources:
    """Reads the audio of entries. Close it, or use it in a `with` block.

    It caches the last recording, because the next entry may be another part of the same recording. It also keeps one
    archive open, so that a compressed archive is decompressed only once.
    """

    def __init__(self) -> None:
        self._fetched: tuple[AudioSource, bytes] | None = None
        self._archive: str | None = None
        self._opened = contextlib.ExitStack()
        self._stream: IO[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read_blocks(self, entry: Entry, sample_rate: int) -> Iterator[Samples]:
        """Yield the samples of an entry in buffers of about ten seconds: one channel, float32, at `sample_rate`.

        Raises:
            AudioError: the audio cannot be read, or ends early. If it ends early, the error is raised after the last
                samples.
        """
        yield from read_blocks(self.open(entry), sample_rate, channel=entry.channel, start=entry.start, end=entry.end)

    def open(self, entry: Entry) -> str | SoundBytes:
        """Return the audio file of an entry, as a path or as bytes.

        Raise AudioError if the audio cannot be read. The message names the source.
        """
        source = entry.source
        if isinstance(source, Unreadable):
            raise AudioError(source.error)
        if isinstance(source, AudioFile) and not is_url(source.path):
            if os.path.exists(source.path) and not os.path.isfile(source.path):  # noqa: PTH110, PTH113 - any name
                raise AudioError(f"{source}: not a regular file: a device or a pipe may never end")
            return source.path
        if self._fetched is None or self._fetched[0] != source:
            try:
                self._fetched = (source, self._fetch(source))
            except AudioError:
                raise
            except Exception as error:  # fsspec's file systems raise errors of their own
                raise AudioError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return SoundBytes(self._fetched[1], str(source))

    def _fetch(self, source: AudioFile | AudioBytes | TarMember | Command) -> bytes:
        if isinstance(source, AudioBytes):
            return source.content
        if isinstance(source, Command):
            return _output_of(source.command)
        if isinstance(source, AudioFile):
            with open_binary(source.path) as stream:
                return _bounded(stream.read(_MOST_BYTES + 1), source)
        if self._archive != source.archive:
            self._archive = None  # stays None if the next archive cannot be opened
            self._opened.close()
            self._stream = decompressed(self._opened.enter_context(open_binary(source.archive)))
            self._archive = source.archive
        self._stream.seek(source.offset)
        content = _bounded(self._stream.read(min(source.size, _MOST_BYTES + 1)), source)
        if len(content) < source.size:
            raise AudioError(f"{source}: the archive ends early")
        return content


def _bounded(content: bytes, source: object) -> bytes:
    if len(content) > _MOST_BYTES:
        raise AudioError(f"{source}: more than {_MOST_BYTES >> 20} MB cannot be copied: use a local file")
    return content


def _output_of(command: str) -> bytes:
    """Run a shell command, and return its standard output."""
    with tempfile.TemporaryFile() as complaints:
        with subprocess.Popen(  # noqa: S602 - the caller allowed the commands of this list
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
            start_new_session=True,
        ) as run:  # fmt: skip
            begin, timer = time.monotonic(), threading.Timer(LONGEST_COMMAND_S, _kill_all, (run,))
            timer.start()
            try:
                output = run.stdout.read(_MOST_BYTES + 1) if run.stdout else b""
                if len(output) > _MOST_BYTES:
                    _kill_all(run)
                run.wait()
            finally:
                timer.cancel()
        complaints.seek(0)
        complaint = complaints.read().decode(errors="replace").strip()[-_LONGEST_COMPLAINT:]
    if time.monotonic() - begin >= LONGEST_COMMAND_S:
        raise AudioError(f"{command}: timed out after {LONGEST_COMMAND_S:.0f} s")
    _bounded(output, command)
    if run.returncode or not output:
        raise AudioError(f"{command}: exited with status {run.returncode} after {len(output)} bytes: {complaint}")
    return output


def _kill_all(run: subprocess.Popen[bytes]) -> None:
    """Kill a shell and all processes that it started. They would otherwise keep its output open."""
    if hasattr(os, "killpg"):
        os.killpg(run.pid, signal.SIGKILL)
    else:
        run.kill()
