"""What the command line does with results: prints them in one of the formats, as they are found, or writes files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from u2moe.runtime.cli.inputs import Input
from u2moe.runtime.cli.outputs import TranscriptFolder
from u2moe.runtime.cli.terminal import complain, print_json, print_result, show_latest, show_progress, tell
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.text.formats import format_transcript
from u2moe.runtime.text.word_errors import WordErrorReport


@dataclass(frozen=True, kw_only=True)
class Results:
    """Shows and writes results.

    Attributes:
        args: `format` and `json_lines`.
        outputs: the folder of the files to write; None: stdout.
        made_by: everything that affects a transcript besides its recording, for the records of the folder.
        is_single: whether there is one recording.
    """

    args: argparse.Namespace
    outputs: TranscriptFolder | None
    made_by: Any
    is_single: bool

    @property
    def _prints_segments(self) -> bool:
        """Whether the text of segments is printed as they are found."""
        return self.is_single and self.outputs is None and self.args.format == "txt" and not self.args.json_lines

    def show(self, item: Input, segment: Result) -> None:
        """Show a segment as soon as it is found."""
        if self.args.json_lines:
            _print_event("segment", item, dataclasses.asdict(segment))
        elif self._prints_segments:
            show_progress("")
            print_result(f"{segment.text}\n")

    def show_partial(self, item: Input, result: Result) -> None:
        """Show a partial result."""
        if self.args.json_lines:
            _print_event("partial", item, {"segment": result.segment, "text": result.text, "words": result.words})
        else:
            show_latest(result.text)

    def write(self, item: Input, transcript: Transcript) -> None:
        """Print or write a transcript; an incomplete one never replaces a complete one."""
        if self.args.json_lines:
            end = {"text": transcript.text, "duration": transcript.duration, "complete": transcript.complete}
            _print_event("end", item, {**end, "error": transcript.error})
            return
        if self._prints_segments:
            if not transcript.segments:
                print_result("\n")
            return
        content = format_transcript(transcript, self.args.format, name=item.name)
        if self.outputs is not None and transcript.complete:
            self.outputs.write(item, content, self.made_by)
        elif self.outputs is not None:
            partial = self.outputs.write_partial(item, content)
            tell(f"{item.name}: not complete: {partial}")
        elif self.args.format == "txt":
            print_result(f"{item.name}\t{transcript.text}\n")
        elif self.args.format == "json":
            print_json(content)
        else:
            print_result(content)

    def fail(self, item: Input, message: str) -> None:
        """Report that nothing of a recording could be recognised, or that its result could not be written."""
        complain(message)
        if self.args.json_lines:
            _print_event("error", item, {"error": message})

    def score(self, errors: WordErrorReport) -> None:
        """Show word errors, if anything was scored."""
        if not errors.num_texts:
            return
        if self.args.json_lines:
            print_json(json.dumps({"type": "word_errors", **errors.data()}, ensure_ascii=False) + "\n")
        else:
            for line in errors.lines():
                tell(line)


def _print_event(kind: str, item: Input, content: dict[str, Any]) -> None:
    event = {"type": kind, "file": item.name, **content}
    print_json(json.dumps(event, ensure_ascii=False, default=dataclasses.asdict) + "\n")
