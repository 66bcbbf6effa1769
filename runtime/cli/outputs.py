"""Destinations of transcripts: stdout, or a file for each recording. Programs can instead read events from stdout."""

import contextlib
import dataclasses
import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from u2moe.runtime.cli.inputs import STDIN, Input
from u2moe.runtime.cli.options import Options
from u2moe.runtime.cli.terminal import encodable, print_json, print_result, show_latest, show_progress, tell
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.result import PhraseResult, Result, Transcript
from u2moe.runtime.text.formats import FORMATS, format_transcript
from u2moe.runtime.whole_file import failures_named, probe, remove_stale_parts, write_bytes

TEXT = "txt"  # The default format. If several recordings go to stdout, each line begins with its name.
EVENTS = "events"
"""A format for stdout only: a line of JSON for each new segment, partial result, and end of a recording."""


def add_output(parser: Options, formats: Iterable[str], default: str, about: str = "") -> None:
    """Add the options --format and --output."""
    about = f"default: the suffix of -o if it is a format, otherwise {default}; json: an object per recording{about}"
    parser.add_argument("-f", "--format", choices=tuple(formats), help=about)
    about = (
        "a folder: one file per recording, in the same subfolders as the recordings; existing files are kept. "
        "With a single recording, PATH may also be a file such as talk.srt whose suffix is a format"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=about)


class Output:
    """A destination for the results of recordings."""

    _told = ("", 0, 0)  # recording, segment, and number of its phrases that were handled

    def missing(self, inputs: Sequence[Input]) -> Sequence[Input]:
        """Return the recordings that must still be recognised."""
        return inputs

    def begin(self) -> None:
        """Write the header. From now on, write each segment as soon as it is found, if the format allows it."""

    def take(self, item: Input, result: Result) -> None:
        """Handle a partial or final result. New phrases of a grammar are handled first."""
        place = (item.name, result.segment)
        num = self._told[2] if self._told[:2] == place else 0
        for phrase in result.phrases[num:]:
            self.phrase(item, result, phrase)
        self._told = (*place, max(num, len(result.phrases)))
        (self.segment if result.is_final else self.partial)(item, result)

    def phrase(self, item: Input, result: Result, phrase: PhraseResult) -> None:
        """Handle a phrase of a grammar. Called once for each phrase."""

    def partial(self, _item: Input, result: Result) -> None:
        """Handle a new partial result of a stream."""
        show_latest(result.text)

    def segment(self, item: Input, segment: Result) -> None:
        """Handle a segment. Called as soon as it is found."""

    def transcript(self, item: Input, transcript: Transcript) -> None:
        """Handle the complete or partial transcript of a recording. Raise U2moeError if writing fails."""
        raise NotImplementedError

    def failure(self, item: Input, message: str) -> None:
        """Handle an error: a recording could not be recognised, or its transcript could not be written."""


def make_output(path: Path | None, file_format: str | None, inputs: Sequence[Input], default: str = TEXT) -> Output:
    """Return the output for recordings.

    `path` is a folder, or a file whose suffix is the name of a format; None: stdout. `file_format` is one of `FORMATS`,
    or `EVENTS`. None: the format that the suffix of `path` names, or else `default`. Raise ValueError if the format
    cannot contain several recordings, or several have one output file, and OSError if the folder cannot be written.
    """
    suffix = "" if path is None or path.is_dir() else path.suffix.removeprefix(".").lower()
    named = next((name for name in FORMATS if name.lower() == suffix), None)
    if path is not None and named is not None:
        if len(inputs) > 1:
            raise ValueError(f"{path}: is a single file, but there are {len(inputs)} recordings: name a folder")
        return _Folder(path.parent, file_format or named, inputs, file=path)
    file_format = file_format or default
    if path is not None:
        return _Folder(path, file_format, inputs)
    if file_format == EVENTS:
        return _Events()
    if FORMATS[file_format].segment is None and len(inputs) > 1:
        raise ValueError(f"to write {file_format} for several recordings, name a folder with --output")
    return _Stdout(file_format, is_single=len(inputs) == 1)


class _Stdout(Output):
    """Output to stdout in one of `FORMATS`. Segments of a single recording are printed one by one if possible."""

    def __init__(self, file_format: str, *, is_single: bool) -> None:
        self._name, self._format = file_format, FORMATS[file_format]
        self._is_live = is_single and self._format.header is not None
        self._header = self._format.header or ""  # emptied when it has been printed

    def begin(self) -> None:
        self._is_live = True
        self._print("")

    def phrase(self, _item: Input, _result: Result, phrase: PhraseResult) -> None:
        tell(f"{phrase.phrase} ({phrase.start:.2f} to {phrase.end:.2f} s, confidence {phrase.confidence:.2f})")

    def segment(self, item: Input, segment: Result) -> None:
        if self._is_live and self._format.segment is not None:
            show_progress("")
            self._print(self._format.segment(segment, item.name))

    def transcript(self, item: Input, transcript: Transcript) -> None:
        if self._is_live:
            if not transcript.segments:
                self._print("\n" if self._name == TEXT else "")
        elif self._name == TEXT:
            self._print(f"{item.name}\t{transcript.text}\n")
        elif self._format.header:
            _, *rows = format_transcript(transcript, self._name).splitlines()
            self._header = self._header and f"file\t{self._header}"
            self._print("".join(f"{item.name}\t{row}\n" for row in rows))
        else:
            self._print(format_transcript(transcript, self._name, name=item.name))

    def _print(self, content: str) -> None:
        content, self._header = self._header + content, ""
        (print_json if self._format.is_json else print_result)(content)


class _Events(Output):
    """Output of events to stdout, each as a line of JSON."""

    def phrase(self, item: Input, result: Result, phrase: PhraseResult) -> None:
        self._print("phrase", item, segment=result.segment, **dataclasses.asdict(phrase))

    def partial(self, item: Input, result: Result) -> None:
        names = ("segment", "text", "words", "committed", "num_committed", "committed_end")
        self._print("partial", item, **{name: getattr(result, name) for name in names})

    def segment(self, item: Input, segment: Result) -> None:
        self._print("segment", item, **dataclasses.asdict(segment))

    def transcript(self, item: Input, transcript: Transcript) -> None:
        names = ("text", "duration", "complete", "error")
        self._print("end", item, **{name: getattr(transcript, name) for name in names})

    def failure(self, item: Input, message: str) -> None:
        self._print("error", item, error=message)

    def _print(self, kind: str, item: Input, **content: Any) -> None:
        event = {"type": kind, "file": item.name, **content}
        print_json(json.dumps(event, ensure_ascii=False, default=dataclasses.asdict) + "\n")


class _Folder(Output):
    """Output of a file per recording, or of the only one to `file`. Several processes may write to the folder."""

    def __init__(self, folder: Path, file_format: str, inputs: Sequence[Input], file: Path | None = None) -> None:
        self._folder, self._format, self._file = folder, file_format, file
        for target, count in Counter(map(self._file_of, inputs)).items():
            if count > 1:
                remedy = "rename the recordings, or recognise them separately"
                raise ValueError(f"{count} transcripts would be written to {target}: {remedy}")
        with failures_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for place in {folder, *(self._file_of(item).parent for item in inputs)}:
            remove_stale_parts(place)
        probe(folder)

    def missing(self, inputs: Sequence[Input]) -> Sequence[Input]:
        """Return stdin and the inputs without an output file. If `file` was given, return all: the file is replaced."""
        if self._file is not None:
            return inputs
        is_there = os.path.exists  # never raises: if a path is unusable, writing reports the error later
        missing = [item for item in inputs if item.file == STDIN or not is_there(self._file_of(item))]
        if len(missing) < len(inputs):
            count = f"{len(inputs) - len(missing)} of {len(inputs)}"
            tell(f"{count} are already in {self._folder}: kept (remove them to recognise them again)")
        return missing

    def transcript(self, item: Input, transcript: Transcript) -> None:
        content = format_transcript(transcript, self._format, name=item.name)
        if FORMATS[self._format].is_json:
            content = encodable(content)
        file = self._file_of(item)
        partial = file.with_name(f"{file.name}.partial")  # never replaces a complete transcript
        target = file if transcript.complete else partial
        try:
            with failures_named(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, content.encode("utf-8", "surrogateescape"))  # file names may not be valid text
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk affects all recordings
                raise
            raise U2moeError(str(error)) from error
        if transcript.complete:
            with contextlib.suppress(OSError):
                partial.unlink()
        else:
            tell(f"{item.name}: incomplete: {partial}")

    def _file_of(self, item: Input) -> Path:
        return self._file or self._folder / f"{item.place}.{self._format}"


def try_to_write(file: Path | None) -> None:
    """Raise OSError if a report cannot be written to `file`. Does not change the file. Call this before long work."""
    if file is None:
        return
    existed = file.exists()
    file.open("ab").close()
    if not existed:
        file.unlink()
