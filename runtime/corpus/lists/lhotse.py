"""Lhotse's cuts (jsonl, jsonl.gz), read without lhotse: parts of recordings, not mixed or transformed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from u2moe.runtime.corpus.entry import AudioFile, AudioSource, Entry
from u2moe.runtime.corpus.lists.lines import json_object, optional_text, parse_lines, seconds_of, text_of
from u2moe.runtime.corpus.lists.options import ListOptions


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Utterances of a set of cuts; supervisions of one cut are joined in their order."""

    def parse(line: str) -> Entry:
        record = json_object(line)
        if "tracks" in record:
            raise ValueError(f"found a cut of type {record.get('type')!r}, expected one that is not mixed")
        recording = _object(record.get("recording"), "recording")
        if recording.get("transforms"):
            raise ValueError("found transforms of the recording, which only lhotse can compute")
        source = _object(_only(recording.get("sources"), "sources"), "sources")
        channel = record.get("channel")
        start, duration = seconds_of(record, "start") or 0.0, seconds_of(record, "duration")
        is_whole = start == 0 and duration is not None and duration == seconds_of(recording, "duration")
        supervisions = [_object(item, "supervisions") for item in record.get("supervisions") or []]
        texts = [optional_text(supervision, "text") for supervision in supervisions]
        speakers = {optional_text(supervision, "speaker") for supervision in supervisions}
        return Entry(
            key=text_of(record, "id"),
            source=_source(source, list_path, options),
            start=start,
            end=None if duration is None or is_whole else start + duration,
            channel=channel if isinstance(channel, int) and source.get("channels", [0]) != [0] else None,
            duration=duration,
            text=" ".join(filter(None, texts)) if any(text is not None for text in texts) else None,
            speaker=speakers.pop() if len(speakers) == 1 else None,
            fields=_object(record.get("custom") or {}, "custom"),
        )

    return parse_lines(list_path, parse)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"field {name!r}: found {value!r:.60}, expected an object")
    return value


def _only(values: Any, name: str) -> Any:
    if not isinstance(values, list) or len(values) != 1:
        raise TypeError(f"field {name!r}: found {values!r:.60}, expected a list of one")
    return values[0]


def _source(source: Mapping[str, Any], list_path: str, options: ListOptions) -> AudioSource:
    kind, entry = source.get("type"), text_of(source, "source")
    if kind == "command":
        return options.command(entry, list_path)
    if kind not in ("file", "url"):
        raise ValueError(f"field 'type' of the source: found {kind!r}, expected 'file' or 'url'")
    return AudioFile(path=options.path(entry, list_path))
