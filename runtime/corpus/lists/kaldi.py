"""Kaldi data folders: wav.scp, and optionally `segments`, `text` and `utt2spk`."""

import os
from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry, ListOptions
from u2moe.runtime.corpus.lists import lines
from u2moe.runtime.corpus.lists.lines import parse_lines, read_lines
from u2moe.runtime.corpus.storage import base_name, join, parent
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import checked_seconds, wrong

_BESIDE = ("segments", "text", "utt2spk")


class _Table:
    """A table of "key value" lines, read in parallel with a list. Both are sorted by `LC_ALL=C sort`, as in Kaldi."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines = read_lines(path)
        self._key, self._value = "", ""
        self._wanted = b""

    def find(self, key: str) -> str | None:
        """Return the value of a key, or None if the table lacks the key. Keys must be looked up in sorted order.

        Raise CorpusError if the table or the list is not sorted.
        """
        wanted = _bytes(key)
        if wanted < self._wanted:
            where = f"{self._path}: the list in the same folder"
            raise CorpusError(f"{where} is not sorted by LC_ALL=C sort: {key!r} is out of order")
        self._wanted = wanted
        while _bytes(self._key) < wanted:
            _, line = next(self._lines, (0, ""))
            if not line:
                return None
            before, (self._key, self._value) = self._key, _split(line)
            if _bytes(self._key) < _bytes(before):
                raise CorpusError(f"{self._path}: not sorted by LC_ALL=C sort: {self._key!r} is out of order")
        return self._value if self._key == key else None


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield an entry for each segment of a data folder, or for each recording if it has no `segments`.

    `list_path` is the folder or its wav.scp. With `segments`, the whole of wav.scp is kept in memory. `text` and
    `utt2spk` are read in step with `segments`, or with wav.scp if there is no `segments`.

    Raise CorpusError if a table or the list is not sorted, or the first line of the list is invalid.
    """
    recordings, *beside = files(list_path)
    tables = {os.path.basename(path): path for path in beside}  # noqa: PTH119
    texts, speakers = (_Table(tables[name]) if name in tables else None for name in ("text", "utt2spk"))
    entries = dict(_split(line) for _, line in read_lines(recordings)) if "segments" in tables else {}

    def parse(line: str) -> Entry:
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
            key=key, source=options.source(entry, recordings), start=start, end=end,
            duration=None if end is None else end - start, text=texts.find(key) if texts else None,
            speaker=speakers.find(key) if speakers else None,
        )  # fmt: skip

    return parse_lines(tables.get("segments", recordings), parse)


def files(list_path: str) -> list[str]:
    """Return the files of a data folder: wav.scp, and then each optional file that exists."""
    recordings = join(list_path, "wav.scp") if os.path.isdir(list_path) else list_path  # noqa: PTH112
    beside = [join(parent(recordings), name) for name in _BESIDE]
    return [recordings, *(path for path in beside if os.path.isfile(path))]  # noqa: PTH113


def content_of(list_path: str, _options: object = None) -> Iterator[bytes]:
    """Yield the content of all files, which identifies the list.

    The content of wav.scp comes first. The name of each further file precedes its content.
    """
    for number, file in enumerate(files(list_path)):
        yield f"{base_name(file)}\n".encode() if number else b""
        yield from lines.content_of(file)


def count(list_path: str) -> int:
    """Return the number of segments, or of recordings if there is no file `segments`."""
    found = files(list_path)
    segments = [file for file in found if base_name(file) == "segments"]
    return lines.count_lines((segments or found)[0])


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _split(line: str) -> tuple[str, str]:
    """Return the key and the value in a line."""
    key, *value = line.split(maxsplit=1)
    return key, value[0] if value else ""
