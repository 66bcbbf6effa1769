"""Entries of a list, with their audio and metadata, the division of the list into blocks, and reading of the audio.

The division is deterministic. Machines therefore agree on the blocks without communication.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.raw import SoundBytes
from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.corpus.storage import is_url, join, open_binary, parent
from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.errors import AudioError, CorpusError
from u2moe.runtime.text.lines import decompressed
from u2moe.runtime.validation import checked_text


@dataclass(frozen=True, kw_only=True)
class AudioFile:
    """A file, or a URL that fsspec supports ("s3://...")."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A file in a tar archive, which is a path or URL. It is read without unpacking the archive."""

    archive: str
    name: str
    offset: int  # position of the first byte in the decompressed archive
    size: int  # in bytes

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class AudioBytes:
    """An audio file in memory."""

    content: bytes = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Command:
    """A shell command that writes an audio file to stdout. Requires `ListOptions.allow_pipes`."""

    command: str

    def __str__(self) -> str:
        return f"{self.command} |"


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Placeholder for a line that cannot be parsed. Reading it raises AudioError."""

    error: str


AudioSource = AudioFile | AudioBytes | TarMember | Command | Unreadable


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of a list: a recording, or part of one.

    Attributes:
        key: name of the entry in the list.
        source: the audio.
        start: start of the entry, in seconds from the beginning of the source.
        end: end of the entry, in seconds from the beginning of the source. None: the end of the source.
        channel: index of the channel to use. None: the average of all channels.
        text: transcript in the list; None if missing.
        speaker: speaker in the list; None if missing.
        duration: duration in seconds, as stated in the list; None if missing.
        fields: the other fields of the entry in the list, as JSON. For a NeMo list, all fields of the entry.
    """

    key: str
    source: AudioSource
    start: float = 0.0
    end: float | None = None
    channel: int | None = None
    text: str | None = None
    speaker: str | None = None
    duration: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ListOptions(Checked):
    """How to interpret the entries of a list.

    Attributes:
        root: folder to which paths are relative. None: the folder of the list.
        allow_pipes: run entries that are shell commands (ending in "|").
        channel: channel to use for every recording, 0 for the left one. None: the channel that the list states for each
            recording, or the average of all channels.
    """

    root: str | None = option("text", flag="--root", metavar="DIR")
    allow_pipes: bool = option("flag", default=False, flag="--allow-pipes")
    channel: int | None = option("integer", least=0, flag="--channel", metavar="N")

    def path(self, path: str, list_path: str) -> str:
        """Return the full path or URL for a path in a list."""
        folder = self.root if self.root is not None else parent(list_path)
        return path if is_url(path) or os.path.isabs(path) else join(folder, path)  # noqa: PTH117 - a URL is not a Path

    def source(self, entry: str, list_path: str) -> AudioSource:
        """Return the source of an entry: a path, or a command that ends in "|".

        Raise CorpusError if it is a command, and commands are not allowed. Raise ValueError if it is empty.
        """
        if checked_text("path", entry).endswith("|"):
            return self.command(entry[:-1].strip(), list_path)
        return AudioFile(path=self.path(entry, list_path))

    def command(self, command: str, list_path: str) -> Command:
        """Return the source for a command. Raise CorpusError if commands are not allowed."""
        if not self.allow_pipes:
            raise CorpusError(f"{list_path}: command {command!r:.80} needs --allow-pipes")
        return Command(command=command)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive entries of a list, at least one."""

    number: int  # index of the block
    start: int  # position of the first entry in the list
    entries: Sequence[Entry]

    @property
    def stop(self) -> int:
        """Position after the last entry."""
        return self.start + len(self.entries)

    @property
    def file_name(self) -> str:
        """Path of the block's file, relative to the folder of blocks. The name contains `start` and `stop`."""
        return f"{self.number // 1000:06}/{self.start:012}-{self.stop:012}.jsonl"


def cut_into_blocks(entries: Iterable[Entry], size: int) -> Iterator[Block]:
    """Yield blocks of `size` entries. The last block may be shorter. Only one block is in memory at a time."""
    remaining = iter(entries)
    number = 0
    while content := tuple(islice(remaining, size)):
        yield Block(number=number, start=number * size, entries=content)
        number += 1


def range_of(file_name: str) -> tuple[int, int] | None:
    """Return the entry positions (first, last + 1) that a result file's name contains; None for any other file name."""
    found = re.fullmatch(r"(?:.*/)?(\d{12})-(\d{12})\.jsonl", file_name)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Every `count`-th block, beginning with block `index`.

    Raises:
        ValueError: `index` is not between 0 and `count` - 1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard must be i/n with 0 <= i < n, got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard for "i/n". Raise ValueError for any other text."""
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None:
            raise ValueError(f"shard must be i/n, such as 0/4, got {text!r}")
        return cls(index=int(found[1]), count=int(found[2]))

    def __contains__(self, number: int) -> bool:
        return number % self.count == self.index


_MOST_BYTES = 4 << 30  # Maximum bytes of a recording that is copied into memory. A larger one must be a local file.
LONGEST_COMMAND_S = 600.0  # Timeout of a command in seconds. A command that hangs must not stop the run.


class Sources(contextlib.ExitStack):
    """Reads the audio of entries. Close it, or use it in a `with` block.

    It caches the last recording, because the next entry may be another part of the same recording. It also keeps one
    archive open, so that a compressed archive is decompressed only once.
    """

    def __init__(self) -> None:
        super().__init__()  # closes the archive
        self._fetched: tuple[AudioSource, bytes] | None = None
        self._archive: str | None = None
        self._stream: IO[bytes]

    def read_blocks(self, entry: Entry, sample_rate: int) -> Iterator[Samples]:
        """Yield samples in buffers of about ten seconds. Raise AudioError if they are unreadable or end early."""
        yield from read_blocks(self.open(entry), sample_rate, channel=entry.channel, start=entry.start, end=entry.end)

    def open(self, entry: Entry) -> str | SoundBytes:
        """Return the audio file of an entry, as a path or as bytes. Raise AudioError, which names the source."""
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
            self.close()
            self._stream = decompressed(self.enter_context(open_binary(source.archive)))
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
        complaint = complaints.read().decode(errors="replace").strip()[-200:]
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
