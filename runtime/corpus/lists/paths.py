"""A list of paths, one for each line, each perhaps with a transcript after a tab."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.lists.lines import parse_lines
from u2moe.runtime.corpus.lists.options import ListOptions


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Utterances of a list of paths; the path as written is the key."""

    def parse(line: str) -> Entry:
        path, tab, transcript = line.partition("\t")
        path = path.strip()
        return Entry(key=path, source=options.source(path, list_path), text=transcript.strip() if tab else None)

    return parse_lines(list_path, parse)
