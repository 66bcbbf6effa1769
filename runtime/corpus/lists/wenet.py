"""WeNet's data.list: a JSON object for each line, with `key`, `wav`, `txt`, perhaps `start` and `end` in seconds."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.lists.lines import json_object, optional_text, others, parse_lines, seconds_of, text_of
from u2moe.runtime.corpus.lists.options import ListOptions


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Utterances of a data.list of the kind "raw"."""

    def parse(line: str) -> Entry:
        record = json_object(line)
        start, end = seconds_of(record, "start") or 0.0, seconds_of(record, "end")
        return Entry(
            key=text_of(record, "key"),
            source=options.source(text_of(record, "wav").strip(), list_path),
            start=start,
            end=end,
            duration=end - start if end is not None else seconds_of(record, "duration"),
            text=optional_text(record, "txt"),
            speaker=optional_text(record, "speaker"),
            fields=others(record, "key", "wav", "txt", "start", "end", "speaker", "duration"),
        )

    return parse_lines(list_path, parse)
