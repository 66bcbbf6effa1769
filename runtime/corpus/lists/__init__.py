"""Lists of entries: one module for each format, the table of formats, their detection, and digests of lists."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from u2moe.runtime.corpus.entry import Entry, ListOptions
from u2moe.runtime.corpus.lists import folder, kaldi, lines, parquet, shards
from u2moe.runtime.corpus.lists.lines import Recording, read_recordings
from u2moe.runtime.corpus.storage import base_name
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_options, refused_as

__all__ = [
    "FORMATS", "ListFormat", "ListOptions", "Recording", "digest", "find_format", "read_recordings", "read_utterances",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ListFormat:
    """A format for lists of recordings. Memory use of `read` does not grow with the number of entries."""

    read: Callable[[str, ListOptions], Iterator[Entry]]
    description: str  # for help texts
    content: Callable[[str, ListOptions], Iterator[bytes]] = lines.content_of  # bytes that identify the list
    count: Callable[[str], int | None] = lines.count_lines  # number of entries; None: the whole list must be read
    field: str | None = None  # name of a field that identifies the format, if its lines are JSON objects


FORMATS: Mapping[str, ListFormat] = MappingProxyType({
    "nemo": ListFormat(read=lines.read_nemo, field="audio_filepath", description="NeMo's jsonl (audio_filepath)"),
    "wenet": ListFormat(read=lines.read_wenet, field="wav", description="WeNet's data.list (key, wav, txt)"),
    "shards": ListFormat(  # counting requires reading all archives
        read=shards.read, content=shards.content_of, count=lambda _: None,
        description="a WeNet tar shard, or a list of shards",
    ),
    "kaldi": ListFormat(
        read=kaldi.read, content=kaldi.content_of, count=kaldi.count, description="a Kaldi data folder, or its wav.scp"
    ),
    "lhotse": ListFormat(read=lines.read_lhotse, field="recording", description="Lhotse's jsonl of cuts (recording)"),
    "parquet": ListFormat(
        read=parquet.read, count=parquet.count_rows,
        description="a Parquet file of a Hugging Face data set (audio, text)",
    ),
    "folder": ListFormat(
        read=folder.read, content=folder.content_of,
        count=lambda path: sum(1 for _ in folder.read(path, ListOptions())), description="a folder of audio files",
    ),
    "paths": ListFormat(read=lines.read_paths, description="a path per line, optionally with a tab and a transcript"),
})  # fmt: skip
"""The list formats by name. To add a format, write a module with a generator, and add a line here."""


def read_utterances(
    list_path: str | os.PathLike[str], *, file_format: str | None = None, options: ListOptions | None = None
) -> Iterator[Entry]:
    """Return an iterator that reads the entries of a list lazily.

    Args:
        list_path: a file, folder or URL.
        file_format: a key of `FORMATS`. None: the format is detected from the name and the first line.
        options: how to interpret the entries.

    Raises:
        CorpusError: the list cannot be read, or has another format. An invalid later line is an `Unreadable` entry.
    """
    path, options = os.fspath(list_path), checked_options("options", options, ListOptions())
    entries = FORMATS[file_format or find_format(path)].read(path, options)
    if options.channel is None:
        return entries
    return (dataclasses.replace(entry, channel=options.channel) for entry in entries)


def find_format(list_path: str) -> str:
    """Return the name of a list's format, detected from the list's name and first line.

    Raise CorpusError if the list cannot be read, is empty, or has no known format.
    """
    if os.path.isdir(list_path):  # noqa: PTH112
        return "kaldi" if os.path.isfile(os.path.join(list_path, "wav.scp")) else "folder"  # noqa: PTH113, PTH118
    if shards.is_archive(list_path):
        return "shards"
    if base_name(list_path).endswith(".parquet"):
        return "parquet"
    _, line = next(lines.read_lines(list_path), (0, ""))
    if not line:
        raise CorpusError(f"{list_path}: lists no recordings")
    if "\0" in line:
        raise CorpusError(f"{list_path}: not a list of recordings, but a binary file, perhaps a recording")
    if not line.startswith("{"):
        if base_name(list_path).endswith(".scp"):
            return "kaldi"
        return "shards" if shards.is_archive(line) else "paths"
    with refused_as(CorpusError, list_path):
        record = lines.json_record(line)
        for name, known in FORMATS.items():
            if known.field is not None and known.field in record:
                return name
        if "tracks" in record:  # a mixed cut; `read_lhotse` then states that it is not supported
            return "lhotse"
        expected = ", ".join(f"{known.field} ({name})" for name, known in FORMATS.items() if known.field is not None)
        raise ValueError(f"the fields must include one of {expected}, got {', '.join(record.values):.80}")


def digest(list_path: str, file_format: str, options: ListOptions) -> str:
    """Return the SHA-256 of the content of a list. For shards, only their names and sizes count.

    Raise CorpusError if a file of the list cannot be read.
    """
    found = hashlib.sha256()
    try:
        for content in FORMATS[file_format].content(list_path, options):
            found.update(content)
    except OSError as error:
        raise CorpusError(f"{list_path}: cannot be read: {error}") from error
    return found.hexdigest()
