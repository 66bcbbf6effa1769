"""Lists with one entry per line: JSON objects (WeNet, NeMo and Lhotse), or paths.

A line that cannot be parsed becomes an unreadable entry.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.corpus.entry import AudioFile, AudioSource, Entry, ListOptions, Unreadable
from u2moe.runtime.corpus.storage import base_name, open_binary
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.text.lines import read_lines as text_lines
from u2moe.runtime.validation import Record, checked_choice, checked_object, wrong

_PIECE = 1 << 20


def read_lines(list_path: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and content of each nonblank line in a text file. The file may be gzipped.

    Bytes that are not valid UTF-8 become surrogates, as in `os.fsdecode`.

    Raise CorpusError if the file cannot be read.
    """
    opened = open_binary(list_path)
    lines = text_lines(list_path, "a list of recordings", CorpusError, opened=opened, errors="surrogateescape")
    return ((number, line.strip()) for number, line in lines)


def count_lines(list_path: str) -> int:
    """Return the number of lines in a text file, not counting blank lines."""
    return sum(1 for _ in read_lines(list_path))


def content_of(list_path: str, _options: object = None) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces. Raise OSError if it cannot be read."""
    with open_binary(list_path) as stream:
        while piece := stream.read(_PIECE):
            yield piece


def parse_lines(list_path: str, parse: Callable[[str], Entry]) -> Iterator[Entry]:
    """Yield the entry of each line.

    A line that cannot be parsed becomes an `Unreadable` entry with the line number as key.

    Args:
        list_path: the file.
        parse: function that parses a line. It raises ValueError for an invalid line.

    Raise CorpusError if the first line cannot be parsed, so the list probably has another format.
    """
    is_first = True
    for number, line in read_lines(list_path):
        try:
            entry = parse(line)
        except (ValueError, RecursionError) as error:
            message = f"{list_path}: line {number}: {error}"
            if is_first:
                raise CorpusError(message) from error
            entry = Entry(key=f"{base_name(list_path)}:{number}", source=Unreadable(error=message))
        is_first = False
        yield entry


def json_record(line: str) -> Record:
    """Return the JSON object in a line. Raise ValueError for anything else."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise wrong("", f"a JSON object ({error})", line) from error
    return Record(values)


def read_paths(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield the entries of a list of paths. A tab and a transcript may follow a path. The path is the key."""

    def parse(line: str) -> Entry:
        path, tab, transcript = line.partition("\t")
        path = path.strip()
        return Entry(key=path, source=options.source(path, list_path), text=transcript.strip() if tab else None)

    return parse_lines(list_path, parse)


def read_wenet(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield the entries of a WeNet data.list of type "raw": `key`, `wav`, `txt`, and optionally `start` and `end`."""

    def parse(line: str) -> Entry:
        record = json_record(line)
        start, end, duration = record.seconds("start") or 0.0, record.seconds("end"), record.seconds("duration")
        return Entry(
            key=record.text("key"), source=options.source(record.text("wav").strip(), list_path), start=start, end=end,
            duration=duration if end is None else end - start, text=record.label("txt"),
            speaker=record.label("speaker"), fields=record.unread(),
        )  # fmt: skip

    return parse_lines(list_path, parse)


def read_nemo(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield the entries of a NeMo list. Each keeps all fields, because NeMo's tools expect them in the output.

    NeMo's lists have no keys, so an entry's key is the path as written, followed by "#" and the offset if there is one.
    """

    def parse(line: str) -> Entry:
        record = json_record(line)
        path = record.text("audio_filepath")
        offset, duration = record.seconds("offset"), record.seconds("duration")
        key = path if offset is None else f"{path}#{record.value('offset')}"
        # Without an offset, the duration is the rounded length of the file. A cut there could lose audio.
        end = None if duration is None or offset is None else offset + duration
        return Entry(
            key=key, source=options.source(path, list_path), start=offset or 0.0, end=end, duration=duration,
            text=record.label("text"), speaker=record.label("speaker"), fields=record.values,
        )  # fmt: skip

    return parse_lines(list_path, parse)


def read_lhotse(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield the entries of a list of Lhotse cuts. Mixed or transformed cuts are not supported.

    The package lhotse is not needed. If a cut has several supervisions, their texts are joined in order.
    """

    def parse(line: str) -> Entry:
        record = json_record(line)
        if "tracks" in record:
            raise record.wrong("type", record.value("type"), "MonoCut or MultiCut")
        recording = record.record("recording")
        if recording.value("transforms"):
            raise recording.wrong("transforms", recording.value("transforms"), "empty (only lhotse can apply them)")
        if len(sources := recording.records("sources")) != 1:
            raise recording.wrong("sources", recording.value("sources"), "a list with one element")
        (source,) = sources
        channel = record.value("channel")
        start, duration = record.seconds("start") or 0.0, record.seconds("duration")
        is_whole = start == 0 and duration is not None and duration == recording.seconds("duration")
        supervisions = record.records("supervisions")
        texts = [supervision.label("text") for supervision in supervisions]
        speakers = {supervision.label("speaker") for supervision in supervisions}
        return Entry(
            key=record.text("id"),
            source=_source_of_lhotse(source, list_path, options),
            start=start,
            end=None if duration is None or is_whole else start + duration,
            channel=channel if isinstance(channel, int) and source.value("channels", [0]) != [0] else None,
            duration=duration,
            text=" ".join(filter(None, texts)) if any(text is not None for text in texts) else None,
            speaker=speakers.pop() if len(speakers) == 1 else None,
            fields=checked_object("custom", record.value("custom") or {}),
        )

    return parse_lines(list_path, parse)


def _source_of_lhotse(source: Record, list_path: str, options: ListOptions) -> AudioSource:
    entry = source.text("source")
    if checked_choice(source.field("type"), source.value("type"), ("command", "file", "url")) == "command":
        return options.command(entry, list_path)
    return AudioFile(path=options.path(entry, list_path))


@dataclass(frozen=True, kw_only=True)
class Recording:
    """An audio file and its transcript."""

    path: Path
    transcript: str


def read_recordings(file: str | os.PathLike[str]) -> list[Recording]:
    """Return the recordings in a text file with lines of "path<TAB>transcript", for measurements.

    Paths are relative to the folder of the file. If `file` is a folder, all recordings in it are returned, with empty
    transcripts.

    Raises:
        AudioError: the folder contains no recordings.
        CorpusError: the file cannot be read, lists no recordings, or has a malformed line. The message names the file
            and the malformed line.
    """
    path = Path(file)
    if path.is_dir():
        return [Recording(path=found, transcript="") for found in find_audio([path])]
    recordings = []
    for number, line in text_lines(path, "a list of recordings", CorpusError):
        name, tab, transcript = line.partition("\t")
        if not tab or not name.strip():
            raise CorpusError(f"{path}: line {number} must be path<TAB>transcript, got {line[:60]!r}")
        recordings.append(Recording(path=path.parent / name.strip(), transcript=transcript.strip()))
    if not recordings:
        raise CorpusError(f"{path}: lists no recordings")
    return recordings
