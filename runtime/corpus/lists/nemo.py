"""NeMo's lists: a JSON object for each line, with `audio_filepath`, perhaps `offset`, `duration` and `text`."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.lists.lines import json_record, parse_lines
from u2moe.runtime.corpus.lists.options import ListOptions


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Utterances of a NeMo list; they keep all fields, since NeMo's tools expect them in the output.

    NeMo has no keys: the path as written is the key, with "#offset" where the line is a part of a file.
    """

    def parse(line: str) -> Entry:
        record = json_record(line)
        path = record.text("audio_filepath")
        offset, duration = record.seconds("offset"), record.seconds("duration")
        start = offset or 0.0
        return Entry(
            key=path if offset is None else f"{path}#{record.value('offset')}",
            source=options.source(path, list_path),
            start=start,
            # Without an offset the duration describes the file, and is rounded: nothing is to be cut off.
            end=None if duration is None or offset is None else start + duration,
            duration=duration,
            text=record.label("text"),
            speaker=record.label("speaker"),
            fields=record.values,
        )

    return parse_lines(list_path, parse)
