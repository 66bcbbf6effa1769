"""An utterance of a corpus: the source of its audio, and its metadata. Reads no audio; `sources` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AudioFile:
    """A file or a URL that fsspec knows ("s3://...")."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A file within a tar archive; its bytes are read in place, nothing is unpacked.

    Attributes:
        archive: the archive, a path or URL.
        name: name of the member.
        offset: position of its first byte in the (decompressed) archive.
        size: number of bytes.
    """

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class AudioBytes:
    """The bytes of a sound file, already in memory."""

    content: bytes = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Command:
    """A shell command that writes a sound file to its standard output; needs `ListOptions.allow_pipes`."""

    command: str

    def __str__(self) -> str:
        return f"{self.command} |"


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Placeholder for a line that cannot be parsed; reading it raises AudioError."""

    error: str

    def __str__(self) -> str:
        return self.error


AudioSource = AudioFile | AudioBytes | TarMember | Command | Unreadable


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of a list: a recording, or a part of one.

    Attributes:
        key: its name in the list.
        source: source of its audio.
        start: seconds into the source at which it begins.
        end: seconds into the source at which it ends; None: at the end of the source.
        channel: index of the only channel to use; None: the average of all.
        text: its transcript, if the list has one.
        speaker: its speaker, if the list names one.
        duration: its length in seconds, if the list states it.
        fields: all other fields of the list, as JSON; of a NeMo list all fields.
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
