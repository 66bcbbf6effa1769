"""NeMo's lists: a JSON object for each line, with `audio_filepath`, perhaps `offset`, `duration` and `text`."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.lists.lines import json_object, optional_text, parse_lines, seconds_of, text_of
from u2moe.runtime.corpus.lists.options import ListOptions


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Utterances of a NeMo list; they keep all fields, since NeMo's tools expect them in the output.

    NeMo has no keys: the path as written is the key, with "#offset" where the line is a part of a file.
    """

    def parse(line: str) -> Entry:
        record = json_object(line)
        path = text_of(record, "audio_filepath")
        offset, duration = seconds_of(record, "offset"), seconds_of(record, "duration")
        start = offset or 0.0
        return Entry(
            key=path if offset is None else f"{path}#{record['offset']}",
            source=options.source(path, list_path),
            start=start,
            # Without an offset the duration describes the file, and is rounded: nothing is to be cut off.
            end=None if duration is None or offset is None else start + duration,
            duration=duration,
            text=optional_text(record, "text"),
            speaker=optional_text(record, "speaker"),
            fields=record,
        )

    return parse_lines(list_path, parse)
