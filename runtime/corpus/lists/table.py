"""The table of list formats, their detection, and the digest that identifies a list."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.lists import folder, kaldi, lhotse, nemo, parquet, paths, shards, wenet
from u2moe.runtime.corpus.lists.lines import first_line, json_record, read_lines
from u2moe.runtime.corpus.lists.options import ListOptions
from u2moe.runtime.corpus.storage import base_name, open_binary, size_of
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_options, refused_as

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ListFormat:
    """One kind of list.

    Attributes:
        read: yields the utterances, given path and options; memory does not grow with their number.
        description: what it is, for people.
        files: the files that make up the list, whose contents are its identity.
    """

    read: Callable[[str, ListOptions], Iterator[Entry]]
    description: str
    files: Callable[[str], list[str]] = lambda list_path: [list_path]


FORMATS: Mapping[str, ListFormat] = MappingProxyType(
    {
        "wenet": ListFormat(read=wenet.read, description="WeNet's data.list (key, wav, txt)"),
        "shards": ListFormat(read=shards.read, description="a tar shard of WeNet's, or a list of them"),
        "kaldi": ListFormat(read=kaldi.read, files=kaldi.files, description="a data folder of Kaldi's, or its wav.scp"),
        "nemo": ListFormat(read=nemo.read, description="NeMo's jsonl (audio_filepath)"),
        "lhotse": ListFormat(read=lhotse.read, description="Lhotse's cuts"),
        "parquet": ListFormat(read=parquet.read, description="Parquet as of Hugging Face's data sets (audio, text)"),
        "folder": ListFormat(read=folder.read, description="a folder of audio files"),
        "paths": ListFormat(read=paths.read, description="a path for each line, perhaps with tab and transcript"),
    }
)
"""The formats of lists by name. A new format is a file with a generator, and a line here."""


def read_utterances(
    list_path: str | os.PathLike[str], *, file_format: str | None = None, options: ListOptions | None = None
) -> Iterator[Entry]:
    """The utterances of a list, as a stream.

    Args:
        list_path: a file, folder or URL.
        file_format: one of `FORMATS`; None: detected from the name and the first line.
        options: how to interpret its entries.

    Raises:
        CorpusError: it cannot be read, or is no list of this format. A later line that cannot be understood is
            an utterance whose source is `Unreadable`.
    """
    path, options = os.fspath(list_path), checked_options("options", options, ListOptions())
    utterances = FORMATS[file_format or find_format(path)].read(path, options)
    if options.channel is None:
        return utterances
    return (dataclasses.replace(utterance, channel=options.channel) for utterance in utterances)


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
    line = first_line(list_path)
    if "\0" in line:
        raise CorpusError(f"{list_path}: is no list of recordings, but a binary file, such as a recording itself")
    if line.startswith("{"):
        return _json_format(list_path, line)
    if base_name(list_path).endswith(".scp"):
        return "kaldi"
    return "shards" if shards.is_archive(line) else "paths"


def _json_format(list_path: str, line: str) -> str:
    with refused_as(CorpusError, list_path):
        record = json_record(line)
    for name, field in (("nemo", "audio_filepath"), ("wenet", "wav"), ("lhotse", "recording"), ("lhotse", "tracks")):
        if field in record:
            return name
    fields = ", ".join(record.values) or "no fields"
    raise CorpusError(
        f"{list_path}: found {fields:.80}, expected audio_filepath (NeMo), wav (WeNet) or recording (Lhotse)"
    )


def count_lines(list_path: str, file_format: str) -> int | None:
    """The number of utterances, where each has a line; None for shards, whose members have to be read for it."""
    if file_format == "shards":
        return None
    if file_format == "folder":
        return sum(1 for _ in folder.read(list_path, ListOptions()))
    if file_format == "parquet":
        return parquet.count_rows(list_path)
    files = FORMATS[file_format].files(list_path)
    segments = [file for file in files if base_name(file) == "segments"]
    return sum(1 for _ in read_lines((segments or files)[0]))


def digest(list_path: str, file_format: str, options: ListOptions) -> str:
    """SHA-256 of what a list lists: the contents of its files, with the sizes of shards.

    Raises:
        CorpusError: one of its files cannot be read.
    """
    found = hashlib.sha256()
    try:
        if file_format == "shards":
            for archive in shards.archives(list_path, options):
                found.update(f"{base_name(archive)} {size_of(archive)}\n".encode("utf-8", "surrogateescape"))
            return found.hexdigest()
        if file_format == "folder":
            for utterance in folder.read(list_path, options):
                found.update(f"{utterance.key}\n".encode("utf-8", "surrogateescape"))
            return found.hexdigest()
        for number, file in enumerate(FORMATS[file_format].files(list_path)):
            found.update(f"{base_name(file)}\n".encode() if number else b"")
            with open_binary(file) as stream:
                while block := stream.read(_BLOCK):
                    found.update(block)
    except OSError as error:
        raise CorpusError(f"{list_path}: cannot be read: {error}") from error
    return found.hexdigest()
