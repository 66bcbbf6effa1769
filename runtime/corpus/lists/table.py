"""The table of list formats, their detection, and the digest that identifies a list."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from u2moe.runtime.corpus.entry import Entry, ListOptions
from u2moe.runtime.corpus.lists import folder, kaldi, lines, parquet, shards
from u2moe.runtime.corpus.lists.lines import content_of, count_lines, json_record, read_lines
from u2moe.runtime.corpus.storage import base_name
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_options, refused_as


@dataclass(frozen=True, kw_only=True)
class ListFormat:
    """One kind of list.

    Attributes:
        read: yields the entries, given path and options; memory does not grow with their number.
        description: what it is, for people.
        content: what it lists, in bytes that are the list's identity.
        count: the number of entries, if it can be known before they are read.
        field: a field that the JSON objects of its lines have, by which it is recognised.
    """

    read: Callable[[str, ListOptions], Iterator[Entry]]
    description: str
    content: Callable[[str, ListOptions], Iterator[bytes]] = content_of
    count: Callable[[str], int | None] = count_lines
    field: str | None = None


FORMATS: Mapping[str, ListFormat] = MappingProxyType(
    {
        "nemo": ListFormat(read=lines.read_nemo, field="audio_filepath", description="NeMo's jsonl (audio_filepath)"),
        "wenet": ListFormat(read=lines.read_wenet, field="wav", description="WeNet's data.list (key, wav, txt)"),
        "shards": ListFormat(
            read=shards.read,
            content=shards.content_of,
            count=lambda _: None,  # the members of all archives have to be read for it
            description="a tar shard of WeNet's, or a list of them",
        ),
        "kaldi": ListFormat(
            read=kaldi.read,
            content=kaldi.content_of,
            count=kaldi.count,
            description="a data folder of Kaldi's, or its wav.scp",
        ),
        "lhotse": ListFormat(read=lines.read_lhotse, field="recording", description="Lhotse's cuts"),
        "parquet": ListFormat(
            read=parquet.read,
            count=parquet.count_rows,
            description="Parquet as of Hugging Face's data sets (audio, text)",
        ),
        "folder": ListFormat(
            read=folder.read, content=folder.content_of, count=folder.count, description="a folder of audio files"
        ),
        "paths": ListFormat(read=lines.read_paths, description="a path for each line, perhaps with tab and transcript"),
    }
)
"""The formats of lists by name. A new format is a file with a generator, and a line here."""


def read_utterances(
    list_path: str | os.PathLike[str], *, file_format: str | None = None, options: ListOptions | None = None
) -> Iterator[Entry]:
    """The entries of a list, as a stream.

    Args:
        list_path: a file, folder or URL.
        file_format: one of `FORMATS`; None: detected from the name and the first line.
        options: how to interpret its entries.

    Raises:
        CorpusError: it cannot be read, or is no list of this format. A later line that cannot be understood is
            an entry whose source is `Unreadable`.
    """
    path, options = os.fspath(list_path), checked_options("options", options, ListOptions())
    entries = FORMATS[file_format or find_format(path)].read(path, options)
    if options.channel is None:
        return entries
    return (dataclasses.replace(entry, channel=options.channel) for entry in entries)


def find_format(list_path: str) -> str:
    """The name of a list's format.

    Raises:
        CorpusError: it cannot be read, or is empty or of no known format.
    """
    if os.path.isdir(list_path):  # noqa: PTH112
        return "kaldi" if os.path.isfile(os.path.join(list_path, "wav.scp")) else "folder"  # noqa: PTH113, PTH118
    if shards.is_archive(list_path):
        return "shards"
    if base_name(list_path).endswith(".parquet"):
        return "parquet"
    _, line = next(read_lines(list_path), (0, ""))
    if not line:
        raise CorpusError(f"{list_path}: lists no recordings")
    if "\0" in line:
        raise CorpusError(f"{list_path}: is no list of recordings, but a binary file, such as a recording itself")
    if not line.startswith("{"):
        if base_name(list_path).endswith(".scp"):
            return "kaldi"
        return "shards" if shards.is_archive(line) else "paths"
    with refused_as(CorpusError, list_path):
        record = json_record(line)
        for name, known in FORMATS.items():
            if known.field is not None and known.field in record:
                return name
        if "tracks" in record:  # a mixed cut, which is refused with its reason
            return "lhotse"
        expected = ", ".join(f"{known.field} ({name})" for name, known in FORMATS.items() if known.field is not None)
        raise ValueError(f"the fields must have one of {expected}, got {', '.join(record.values):.80}")


def digest(list_path: str, file_format: str, options: ListOptions) -> str:
    """SHA-256 of what a list lists: the contents of its files, with the sizes of shards.

    Raises:
        CorpusError: one of its files cannot be read.
    """
    found = hashlib.sha256()
    try:
        for content in FORMATS[file_format].content(list_path, options):
            found.update(content)
    except OSError as error:
        raise CorpusError(f"{list_path}: cannot be read: {error}") from error
    return found.hexdigest()
