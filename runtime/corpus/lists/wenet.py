"""WeNet's data.list: a JSON object for each line, with `key`, `wav`, `txt`, perhaps `start` and `end` in seconds."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.lists.lines import json_record, parse_lines
from u2moe.runtime.corpus.lists.options import ListOptions


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Utterances of a data.list of the kind "raw"."""

    def parse(line: str) -> Entry:
        record = json_record(line)
        start, end, duration = record.seconds("start") or 0.0, record.seconds("end"), record.seconds("duration")
        return Entry(
            key=record.text("key"),
            source=options.source(record.text("wav").strip(), list_path),
            start=start,
            end=end,
            duration=duration if end is None else end - start,
            text=record.label("txt"),
            speaker=record.label("speaker"),
            fields=record.unread(),
        )

    return parse_lines(list_path, parse)
