"""Lhotse's cuts (jsonl, jsonl.gz), read without lhotse: parts of recordings, not mixed or transformed."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.runtime.corpus.entry import AudioFile, AudioSource, Entry
from u2moe.runtime.corpus.lists.lines import json_record, parse_lines
from u2moe.runtime.corpus.lists.options import ListOptions
from u2moe.runtime.validation import Record, checked_choice, checked_object


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Utterances of a set of cuts; supervisions of one cut are joined in their order."""

    def parse(line: str) -> Entry:
        record = json_record(line)
        if "tracks" in record:
            raise record.wrong("type", record.value("type"), "that of a cut that is not mixed")
        recording = record.record("recording")
        if recording.value("transforms"):
            raise recording.wrong("transforms", recording.value("transforms"), "empty: only lhotse can compute them")
        sources = recording.records("sources")
        if len(sources) != 1:
            raise recording.wrong("sources", recording.value("sources"), "a list of one")
        (source,) = sources
        channel = record.value("channel")
        start, duration = record.seconds("start") or 0.0, record.seconds("duration")
        is_whole = start == 0 and duration is not None and duration == recording.seconds("duration")
        supervisions = record.records("supervisions")
        texts = [supervision.label("text") for supervision in supervisions]
        speakers = {supervision.label("speaker") for supervision in supervisions}
        return Entry(
            key=record.text("id"),
            source=_source(source, list_path, options),
            start=start,
            end=None if duration is None or is_whole else start + duration,
            channel=channel if isinstance(channel, int) and source.value("channels", [0]) != [0] else None,
            duration=duration,
            text=" ".join(filter(None, texts)) if any(text is not None for text in texts) else None,
            speaker=speakers.pop() if len(speakers) == 1 else None,
            fields=checked_object("custom", record.value("custom") or {}),
        )

    return parse_lines(list_path, parse)


def _source(source: Record, list_path: str, options: ListOptions) -> AudioSource:
    entry = source.text("source")
    if checked_choice(source.field("type"), source.value("type"), ("command", "file", "url")) == "command":
        return options.command(entry, list_path)
    return AudioFile(path=options.path(entry, list_path))
