"""Transcripts as text: one table of output formats, which the command line reads. Subtitles are cut elsewhere."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from u2moe.runtime.subtitles import SubtitleOptions, make_cues, timed_words, to_ms

if TYPE_CHECKING:
    from u2moe.runtime.result import Transcript


@dataclass(frozen=True, kw_only=True)
class OutputFormat:
    """One way to write transcripts.

    Attributes:
        write: the content of a file, from a transcript, the name of the recording, and how to cut subtitles.
        can_be_joined: whether the contents of several recordings, one after the other, are a valid content too.
    """

    write: Callable[[Transcript, str, SubtitleOptions | None], str]
    can_be_joined: bool


def format_transcript(
    transcript: Transcript, file_format: str, *, name: str = "audio", options: SubtitleOptions | None = None
) -> str:
    """The content of a file of that format; it ends in a line feed, unless it is empty.

    txt: the text of each segment on a line. json: one object on a line, with everything. srt, vtt: subtitles. ctm:
    "file channel start duration word confidence" for each word, seconds, as NIST's tools read it. tsv: start and end in
    milliseconds, and text, for each segment, below a header.

    Args:
        transcript: what was recognised.
        file_format: one of `FORMATS`.
        name: of the recording, for json and ctm.
        options: how to cut subtitles.

    Raises:
        ValueError: another format.
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
"""The output formats by name, which is the suffix of their files too: a new one is a function and a line here."""
