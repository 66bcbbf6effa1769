"""Writes transcripts as text in the output formats. The module `subtitles` cuts segments into subtitles."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.text.subtitles import SubtitleOptions, make_cues, timed_words, to_ms


@dataclass(frozen=True, kw_only=True)
class OutputFormat:
    """A format of transcripts.

    `write` returns the content of a file, given a transcript, the name of the recording, and subtitle options.
    `segment` returns the lines of a segment, given the segment and the recording's name; None: segments cannot be
    written one at a time. `header` is the first line of a file, such as column names, if all other lines come from
    `segment`; "": there is none; None: files have another structure. `media_type` is that of a server's responses.
    """

    write: Callable[[Transcript, str, SubtitleOptions | None], str]
    segment: Callable[[Result, str], str] | None = None
    header: str | None = None
    media_type: str = "text/plain"

    @property
    def is_json(self) -> bool:
        """Whether characters may be written as JSON escapes."""
        return self.media_type == "application/json"


def format_transcript(
    transcript: Transcript, file_format: str, *, name: str = "audio", options: SubtitleOptions | None = None
) -> str:
    """Return a transcript as the content of a file, which ends in a line feed unless it is empty.

    Args:
        transcript: the transcript.
        file_format: one of `FORMATS`.
        name: name of the recording, for json and ctm.
        options: how to cut subtitles.

    Raises:
        ValueError: the format is unknown.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    return FORMATS[file_format].write(transcript, name, options)


def _by_segment(segment: Callable[[Result, str], str], header: str = "") -> OutputFormat:
    """Return a format whose files consist of a header and the lines of each segment."""

    def write(transcript: Transcript, name: str, _options: SubtitleOptions | None) -> str:
        return header + "".join(segment(each, name) for each in transcript.segments)

    return OutputFormat(write=write, segment=segment, header=header)


def _json(content: Transcript | Result, **more: str) -> str:
    """Return a transcript or a segment as a JSON object on one line, after `more` fields."""
    return json.dumps({**more, **dataclasses.asdict(content)}, ensure_ascii=False) + "\n"


def _srt(transcript: Transcript, _name: str, options: SubtitleOptions | None) -> str:
    return "\n".join(
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n" + "\n".join(cue.lines) + "\n"
        for number, cue in enumerate(make_cues(transcript.segments, options), start=1)
    )


def _vtt(transcript: Transcript, _name: str, options: SubtitleOptions | None) -> str:
    return "WEBVTT\n" + "".join(
        f"\n{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{escape(chr(10).join(cue.lines), quote=False)}\n"
        for cue in make_cues(transcript.segments, options)
    )


def _ctm(segment: Result, name: str) -> str:
    """Return CTM lines for NIST's tools, one per word: "file channel start duration word [confidence]", in seconds."""
    recording, lines = re.sub(r"\s+", "_", name) or "audio", ""
    confidences = [word.confidence for word in segment.words] or [None] * len(segment.text.split())
    for (word, start, end), confidence in zip(timed_words(segment), confidences, strict=True):
        lines += f"{recording} 1 {_seconds(start)} {_seconds(end - start)} {''.join(word.split())}"
        lines += "\n" if confidence is None else f" {confidence:.3f}\n"
    return lines


def _textgrid(transcript: Transcript, _name: str, _options: SubtitleOptions | None) -> str:
    """Return a short-form TextGrid for Praat, with a tier of segments and a tier of words."""
    words = [word for segment in transcript.segments for word in timed_words(segment)]
    segments = [(each.text, to_ms(each.start), to_ms(each.end)) for each in transcript.segments]
    tiers = {"segments": segments, "words": words}
    end = max([to_ms(transcript.duration), 1, *(last for _, _, last in (*segments, *words))])
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "0", _seconds(end), "<exists>", "2"]
    for tier, content in tiers.items():
        intervals = _intervals(content, end)
        lines += ['"IntervalTier"', f'"{tier}"', "0", _seconds(end), str(len(intervals))]
        for text, start, last in intervals:
            lines += [_seconds(start), _seconds(last), '"' + text.replace('"', '""') + '"']
    return "\n".join(lines) + "\n"


def _intervals(content: Sequence[tuple[str, int, int]], end: int) -> list[tuple[str, int, int]]:
    """Return texts as non-overlapping intervals in milliseconds. Each gap before `end` is an interval with text ""."""
    intervals: list[tuple[str, int, int]] = []
    position = 0
    for text, start, last in content:
        if start > position:
            intervals.append(("", position, start))
            position = start
        if last > position:
            intervals.append((text, position, last))
            position = last
    return [*intervals, ("", position, end)] if position < end else intervals


def _seconds(ms: int) -> str:
    return f"{ms // 1000}.{ms % 1000:03}"


def _clock(ms: int, point: str) -> str:
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


FORMATS: Mapping[str, OutputFormat] = {
    "txt": _by_segment(lambda segment, _: f"{segment.text}\n"),
    "json": OutputFormat(
        write=lambda transcript, name, _: _json(transcript, file=name),
        segment=lambda segment, _: _json(segment),
        media_type="application/json",
    ),
    "srt": OutputFormat(write=_srt),
    "vtt": OutputFormat(write=_vtt, media_type="text/vtt"),
    "ctm": _by_segment(_ctm),
    "tsv": _by_segment(lambda each, _: f"{to_ms(each.start)}\t{to_ms(each.end)}\t{each.text}\n", "start\tend\ttext\n"),
    "TextGrid": OutputFormat(write=_textgrid),
}
"""The output formats by name, which is also the file suffix. The command line and the server use this table."""
