"""Kaldi data folders: wav.scp, and optionally `segments`, `text` and `utt2spk`."""

import os
from collections.abc import Callable, Iterator

from u2moe.runtime.corpus.entry import Entry, ListOptions
from u2moe.runtime.corpus.lists import lines
from u2moe.runtime.corpus.lists.lines import by_line, read_lines
from u2moe.runtime.corpus.storage import base_name, join, parent
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_seconds, wrong


def _lookup(path: str) -> Callable[[str], str | None]:
    """Return a function that finds the value of a key in a table of "key value" lines, or None if it lacks the key.

    The table is read in parallel with a list, so keys must be looked up in order. Both are sorted by `LC_ALL=C sort`
    as in Kaldi. The function raises CorpusError if the table or the list is not sorted.
    """
    table = read_lines(path)
    found, value, wanted = "", "", b""

    def find(key: str) -> str | None:
        nonlocal found, value, wanted
        before, wanted = wanted, _bytes(key)
        if wanted < before:
            where = f"{path}: the list in the same folder"
            raise CorpusError(f"{where} is not sorted by LC_ALL=C sort: {key!r} is out of order")
        while _bytes(found) < wanted:
            _, line = next(table, (0, ""))
            if not line:
                return None
            previous, (found, value) = found, _split(line)
            if _bytes(found) < _bytes(previous):
                raise CorpusError(f"{path}: not sorted by LC_ALL=C sort: {found!r} is out of order")
        return value if found == key else None

    return find


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield an entry for each segment of a data folder, or for each recording if it has no `segments`.

    `list_path` is the folder or its wav.scp. With `segments`, the whole of wav.scp is kept in memory. `text` and
    `utt2spk` are read in step with `segments`, or with wav.scp if there is no `segments`.

    Raise CorpusError if a table or the list is not sorted, or the first line of the list is invalid.
    """
    recordings, *beside = files(list_path)
    tables = {os.path.basename(path): path for path in beside}  # noqa: PTH119
    texts, speakers = (_lookup(tables[name]) if name in tables else (lambda _: None) for name in ("text", "utt2spk"))
    entries = dict(_split(line) for _, line in read_lines(recordings)) if "segments" in tables else {}

    @by_line
    def read_table(line: str, _path: str, options: ListOptions) -> Entry:
        start = 0.0
        end: float | None = None
        if "segments" in tables:
            words = line.split()
            if len(words) not in (4, 5):
                raise wrong("", "utterance, recording, start and end", line)
            (key, recording), start = words[:2], checked_seconds("start", words[2])
            if not words[3].startswith("-"):  # in Kaldi, -1 means the end of the recording
                end = checked_seconds("end", words[3])
            if recording not in entries:
                raise ValueError(f"recording {recording!r} is not in {recordings}")
            entry = entries[recording]
        else:
            key, entry = _split(line)
        return Entry(
            key=key,
            source=options.source(entry, recordings),
            start=start,
            end=end,
            duration=None if end is None else end - start,
            text=texts(key),
            speaker=speakers(key),
        )

    return read_table(tables.get("segments", recordings), options)


def files(list_path: str) -> list[str]:
    """Return the files of a data folder: wav.scp, and then each optional file that exists."""
    recordings = join(list_path, "wav.scp") if os.path.isdir(list_path) else list_path  # noqa: PTH112
    beside = (join(parent(recordings), name) for name in ("segments", "text", "utt2spk"))
    return [recordings, *filter(os.path.isfile, beside)]


def content_of(list_path: str, _options: object = None) -> Iterator[bytes]:
    """Yield the content of all files, which identifies the list. The name of each file but wav.scp precedes it."""
    for number, file in enumerate(files(list_path)):
        yield f"{base_name(file)}\n".encode() if number else b""
        yield from lines.content_of(file)


def count(list_path: str) -> int:
    """Return the number of segments, or of recordings if there is no file `segments`."""
    recordings, *beside = files(list_path)
    return lines.count_lines(next((file for file in beside if base_name(file) == "segments"), recordings))


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _split(line: str) -> tuple[str, str]:
    """Return the key and the value in a line."""
    key, *value = line.split(maxsplit=1)
    return key, value[0] if value else ""
