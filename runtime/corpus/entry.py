"""Entries of a list, with their audio and metadata, and the division of the list into blocks.

The division is deterministic. Machines therefore agree on the blocks without communication. `sources` reads the audio.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from u2moe.runtime.corpus.storage import parent, resolve
from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.errors import CorpusError
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
        return resolve(path, self.root if self.root is not None else parent(list_path))

    def source(self, entry: str, list_path: str) -> AudioSource:
        """Return the source of an entry. `entry` is a path, or a command that ends in "|".

        Raises:
            CorpusError: the entry is a command, and commands are not allowed.
            ValueError: the entry is empty.
        """
        if checked_text("path", entry).endswith("|"):
            return self.command(entry[:-1].strip(), list_path)
        return AudioFile(path=self.path(entry, list_path))

    def command(self, command: str, list_path: str) -> Command:
        """Return the source for a command. Raise CorpusError if commands are not allowed."""
        if not self.allow_pipes:
            raise CorpusError(f"{list_path}: command {command!r:.80} needs --allow-pipes")
        return Command(command=command)


_BLOCKS_PER_FOLDER = 1000
_NAME = re.compile(r"(?:.*/)?(\d{12})-(\d{12})\.jsonl")


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
        return f"{self.number // _BLOCKS_PER_FOLDER:06}/{self.start:012}-{self.stop:012}.jsonl"


def cut_into_blocks(entries: Iterable[Entry], size: int) -> Iterator[Block]:
    """Yield blocks of `size` entries. The last block may be shorter. Only one block is in memory at a time."""
    remaining = iter(entries)
    number = 0
    while content := tuple(islice(remaining, size)):
        yield Block(number=number, start=number * size, entries=content)
        number += 1


def range_of(file_name: str) -> tuple[int, int] | None:
    """Return the entry positions (first, last + 1) that a result file's name contains; None for any other file name."""
    found = _NAME.fullmatch(file_name)
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
