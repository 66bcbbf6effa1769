"""Transcripts as text: the table of output formats, also used by the command line. Cutting subtitles is elsewhere."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from u2moe.runtime.text.subtitles import SubtitleOptions, make_cues, timed_words, to_ms

if TYPE_CHECKING:
    from u2moe.runtime.result import Transcript


@dataclass(frozen=True, kw_only=True)
class OutputFormat:
    """One way to write transcripts.

    Attributes:
        write: returns the content of a file, given a transcript, the name of the recording, and subtitle options.
        can_be_joined: whether the concatenated contents of several recordings are also valid.
    """

    write: Callable[[Transcript, str, SubtitleOptions | None], str]
    can_be_joined: bool


def format_transcript(
    transcript: Transcript, file_format: str, *, name: str = "audio", options: SubtitleOptions | None = None
) -> str:
    """The content of a file in a format; it ends in a line feed, unless it is empty.

    txt: one line of text per segment. json: one line with an object that has everything. srt, vtt: subtitles. ctm:
    "file channel start duration word confidence" per word, in seconds, as read by NIST's tools. tsv: start and end in
    milliseconds, and text, for each segment, after a header.

    Args:
        transcript: the transcript.
        file_format: one of `FORMATS`.
        name: name of the recording, for json and ctm.
        options: how to cut subtitles.

    Raises:
        ValueError: an unknown format.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    return FORMATS[file_format].write(transcript, name, options)


def _txt(transcript: Transcript, _name: str, _options: SubtitleOptions | None) -> str:
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def _json(transcript: Transcript, name: str, _options: SubtitleOptions | None) -> str:
    return json.dumps({"file": name, **dataclasses.asdict(transcript)}, ensure_ascii=False) + "\n"


def _tsv(transcript: Transcript, _name: str, _options: SubtitleOptions | None) -> str:
    rows = (f"{to_ms(segment.start)}\t{to_ms(segment.end)}\t{segment.text}\n" for segment in transcript.segments)
    return "start\tend\ttext\n" + "".join(rows)


def _srt(transcript: Transcript, _name: str, options: SubtitleOptions | None) -> str:
    return "\n".join(
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n" + "\n".join(cue.lines) + "\n"
        for number, cue in enumerate(make_cues(transcript.segments, options), start=1)
    )


def _vtt(transcript: Transcript, _name: str, options: SubtitleOptions | None) -> str:
    return "WEBVTT\n" + "".join(
        f"\n{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{_escape(chr(10).join(cue.lines))}\n"
        for cue in make_cues(transcript.segments, options)
    )


def _ctm(transcript: Transcript, name: str, _options: SubtitleOptions | None) -> str:
    recording = re.sub(r"\s+", "_", name) or "audio"
    lines = []
    for segment in transcript.segments:
        confidences = [word.confidence for word in segment.words] or [None] * len(segment.text.split())
        for (word, start, end), confidence in zip(timed_words(segment), confidences, strict=True):
            line = f"{recording} 1 {_seconds(start)} {_seconds(end - start)} {word}"
            lines.append(line + ("\n" if confidence is None else f" {confidence:.3f}\n"))
    return "".join(lines)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _seconds(ms: int) -> str:
    return f"{ms // 1000}.{ms % 1000:03}"


def _clock(ms: int, point: str) -> str:
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


FORMATS: Mapping[str, OutputFormat] = MappingProxyType(
    {
        "txt": OutputFormat(write=_txt, can_be_joined=True),
        "json": OutputFormat(write=_json, can_be_joined=True),
        "srt": OutputFormat(write=_srt, can_be_joined=False),
        "vtt": OutputFormat(write=_vtt, can_be_joined=False),
        "ctm": OutputFormat(write=_ctm, can_be_joined=True),
        "tsv": OutputFormat(write=_tsv, can_be_joined=False),
    }
)
"""The output formats by name, which is also the file suffix. A new format is a function and a line here."""
