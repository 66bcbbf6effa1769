"""Lists with one entry per line: JSON objects (WeNet, NeMo and Lhotse), or paths."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.corpus.entry import AudioFile, Entry, ListOptions, Unreadable
from u2moe.runtime.corpus.storage import base_name, open_binary
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.text.lines import read_lines as text_lines
from u2moe.runtime.validation import Record, checked_choice, checked_object, wrong


def read_lines(list_path: str) -> Iterator[tuple[int, str]]:
    """Yield number and content of nonblank lines. Invalid UTF-8 becomes surrogates. Raise CorpusError if unreadable."""
    opened = open_binary(list_path)
    lines = text_lines(list_path, "a list of recordings", CorpusError, opened=opened, errors="surrogateescape")
    return ((number, line.strip()) for number, line in lines)


def count_lines(list_path: str) -> int:
    """Return the number of lines in a text file, not counting blank lines."""
    return sum(1 for _ in read_lines(list_path))


def content_of(list_path: str, _options: object = None) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces. Raise OSError if it cannot be read."""
    with open_binary(list_path) as stream:
        while piece := stream.read(1 << 20):
            yield piece


def by_line(parse: Callable[[str, str, ListOptions], Entry]) -> Callable[[str, ListOptions], Iterator[Entry]]:
    """Turn a function that parses a line, given the path of the list and options, into a reader of lists.

    `parse` raises ValueError for an invalid line. It becomes an `Unreadable` entry with the line number as key. If the
    first line is invalid, the list probably has another format, and the reader raises CorpusError.
    """

    def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
        is_first = True
        for number, line in read_lines(list_path):
            try:
                entry = parse(line, list_path, options)
            except (ValueError, RecursionError) as error:
                message = f"{list_path}: line {number}: {error}"
                if is_first:
                    raise CorpusError(message) from error
                entry = Entry(key=f"{base_name(list_path)}:{number}", source=Unreadable(error=message))
            is_first = False
            yield entry

    return read


def json_record(line: str) -> Record:
    """Return the JSON object in a line. Raise ValueError for anything else."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise wrong("", f"a JSON object ({error})", line) from error
    return Record(values)


@by_line
def read_paths(line: str, list_path: str, options: ListOptions) -> Entry:
    """Return the entry of a path. A tab and a transcript may follow it. The path is the key."""
    path, tab, transcript = line.partition("\t")
    path = path.strip()
    return Entry(key=path, source=options.source(path, list_path), text=transcript.strip() if tab else None)


@by_line
def read_wenet(line: str, list_path: str, options: ListOptions) -> Entry:
    """Return the entry of a line of WeNet's data.list ("raw"): `key`, `wav`, `txt`, optionally `start`, `end`."""
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


@by_line
def read_nemo(line: str, list_path: str, options: ListOptions) -> Entry:
    """Return the entry of a line of a NeMo list. It keeps all fields, because NeMo's tools expect them in the output.

    NeMo's lists have no keys, so an entry's key is the path as written, followed by "#" and the offset if there is one.
    """
    record = json_record(line)
    path = record.text("audio_filepath")
    offset, duration = record.seconds("offset"), record.seconds("duration")
    return Entry(
        key=path if offset is None else f"{path}#{record.value('offset')}",
        source=options.source(path, list_path),
        # Without an offset, the duration is the rounded length of the file. A cut there could lose audio.
        start=offset or 0.0,
        end=None if duration is None or offset is None else offset + duration,
        duration=duration,
        text=record.label("text"),
        speaker=record.label("speaker"),
        fields=record.values,
    )


@by_line
def read_lhotse(line: str, list_path: str, options: ListOptions) -> Entry:
    """Return the entry of a Lhotse cut. The package lhotse is not needed. Mixed or transformed cuts are not supported.

    If a cut has several supervisions, their texts are joined in order.
    """
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
    key, place = record.text("id"), source.text("source")
    is_command = checked_choice(source.field("type"), source.value("type"), ("command", "file", "url")) == "command"
    return Entry(
        key=key,
        source=options.command(place, list_path) if is_command else AudioFile(path=options.path(place, list_path)),
        start=start,
        end=None if duration is None or is_whole else start + duration,
        duration=duration,
        channel=channel if isinstance(channel, int) and source.value("channels", [0]) != [0] else None,
        text=" ".join(filter(None, texts)) if any(text is not None for text in texts) else None,
        speaker=speakers.pop() if len(speakers) == 1 else None,
        fields=checked_object("custom", record.value("custom") or {}),
    )


@dataclass(frozen=True, kw_only=True)
class Recording:
    """An audio file and its transcript."""

    path: Path
    transcript: str


def read_recordings(file: str | os.PathLike[str]) -> list[Recording]:
    """Return the recordings in a text file with lines of "path<TAB>transcript", for measurements.

    Paths are relative to the folder of the file. If `file` is a folder, all recordings in it are returned, with empty
    transcripts. Raise AudioError if it contains no recordings, and CorpusError if the file cannot be read, lists
    no recordings, or has a malformed line. The message names the file and the malformed line.
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
