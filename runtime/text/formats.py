"""Writes transcripts as text in the output formats, and cuts segments into subtitles with lines and times."""

import dataclasses
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from operator import itemgetter
from typing import NamedTuple

from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.validation import checked_options

_MOST_S = 1e9  # upper limit of durations in seconds, longer than any recording


@dataclass(frozen=True, kw_only=True)
class SubtitleOptions(Checked):
    """How to cut subtitles. The defaults follow broadcasters' guidelines.

    Attributes:
        max_line_width: columns per line. East Asian wide characters take two.
        max_lines: number of lines shown at once.
        min_duration: minimum seconds of a subtitle, if the next one leaves time.
        max_duration: maximum seconds from the first to the last word of a subtitle, unless it has only one word.
        max_chars_per_s: reading speed in columns per second. A subtitle stays long enough to be read at this speed, if
            the next one leaves time.
        max_pause: maximum seconds of a pause within a subtitle.
        gap: minimum seconds from the end of a subtitle to the next one, if the subtitle is still shown after its last
            word. The default is two frames at 24 per second.
    """

    max_line_width: int = option("integer", 42, least=2)
    max_lines: int = option("integer", 2, least=1)
    min_duration: float = option("number", 1.0, least=0, most=_MOST_S, unit="seconds")
    max_duration: float = option("number", 7.0, above=0, most=_MOST_S, unit="seconds")
    max_chars_per_s: float = option("number", 17.0, least=0.1, most=1e6, unit="columns")
    max_pause: float = option("number", 2.0, above=0, most=_MOST_S, unit="seconds")
    gap: float = option("number", 0.083, least=0, most=_MOST_S, unit="seconds")


@dataclass(frozen=True, kw_only=True)
class Cue:
    """A subtitle: its lines, and its times in milliseconds from the start of the audio."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


class _Part(NamedTuple):
    """A word, or a piece of a word that is too long for a line. `space` precedes it; `width` is in columns."""

    text: str
    space: str
    width: int
    start_ms: int
    end_ms: int


def make_cues(segments: Sequence[Result], options: SubtitleOptions | None = None) -> list[Cue]:
    """Cut segments into subtitles, in order and without overlaps. No subtitle spans two segments."""
    options = checked_options("options", options, SubtitleOptions())
    groups = [group for segment in segments for group in _cut(_parts(segment, options), options)]
    cues: list[Cue] = []
    for index, group in enumerate(groups):
        # Words may touch, but a subtitle must end before the next begins.
        start = max(group[0].start_ms, cues[-1].end_ms if cues else 0)
        spoken = max(group[-1].end_ms, start + 1)
        readable = math.ceil(1000 * _columns(group) / options.max_chars_per_s)
        end = max(spoken, start + max(readable, to_ms(options.min_duration)))
        if index + 1 < len(groups):
            following = groups[index + 1][0].start_ms
            end = min(end, max(min(spoken, following), following - to_ms(options.gap), start + 1))
        cues.append(Cue(start_ms=start, end_ms=end, lines=tuple(_wrap(group, options))))
    return cues


def _cut(parts: list[_Part], options: SubtitleOptions) -> list[list[_Part]]:
    """Find the cheapest way to cut a segment: few subtitles that end at pauses, and none nearly empty."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # by end: cost, and beginning of the last subtitle
    for end in range(1, len(parts) + 1):
        pause_s = max(parts[end].start_ms - parts[end - 1].end_ms, 0) / 1000 if end < len(parts) else math.inf
        ways: list[tuple[float, int]] = []
        for begin in range(end - 1, -1, -1):
            group = parts[begin:end]
            if len(group) > 1 and not _fits(group, options):
                break
            emptiness = 1 - _columns(group) / (options.max_line_width * options.max_lines)
            ways.append((best[begin][0] + (1 + max(emptiness, 0.0) ** 2) + 1 / (1 + 10 * pause_s), begin))
        best.append(min(ways, key=itemgetter(0)))
    groups, end = list[list[_Part]](), len(parts)
    while end > 0:
        groups.insert(0, parts[best[end][1] : end])
        end = best[end][1]
    return groups


def _fits(group: list[_Part], options: SubtitleOptions) -> bool:
    is_short = group[-1].end_ms - group[0].start_ms <= 1000 * options.max_duration
    # Later pauses were checked with shorter groups.
    if not is_short or group[1].start_ms - group[0].end_ms > 1000 * options.max_pause:
        return False
    return len(_fill(group, options.max_line_width)) <= options.max_lines


def _wrap(group: list[_Part], options: SubtitleOptions) -> list[str]:
    """Return the lines of a subtitle: as few as possible, of similar width, with longer lines below."""
    lines = _fill(group, options.max_line_width)
    narrower = (_fill(group, width) for width in range(_columns(group) // len(lines), options.max_line_width))
    lines = next((found for found in narrower if len(found) == len(lines)), lines)
    return ["".join(part.space + part.text for part in line).strip() for line in lines]


def _fill(group: list[_Part], max_width: int) -> list[list[_Part]]:
    """Fill lines backwards from the last word, so that the first line gets the remaining words."""
    starts, width, space = [len(group)], 0, 0
    for index in range(len(group) - 1, -1, -1):
        width += group[index].width + space
        space = len(group[index].space)
        if width > max_width and index + 1 < starts[-1]:
            starts.append(index + 1)
            width = group[index].width
    starts.append(0)
    return [group[start:end] for start, end in itertools.pairwise(reversed(starts))]


def _parts(segment: Result, options: SubtitleOptions) -> list[_Part]:
    """Return the words of a segment with the spaces between them. Words wider than a line are split."""
    parts, position = list[_Part](), 0
    for word, start, end in timed_words(segment):
        found = segment.text.find(word, position)
        space = " " if found < 0 or segment.text[position:found].strip() != segment.text[position:found] else ""
        position = position if found < 0 else found + len(word)
        texts = _split(word, options.max_line_width)
        step = (end - start) / len(texts)
        for index, text in enumerate(texts):
            times = round(start + index * step), round(start + (index + 1) * step)
            parts.append(_Part(text, "" if index else space, _width(text), *times))
    return parts


def timed_words(segment: Result) -> list[tuple[str, int, int]]:
    """Return words with start and end in milliseconds. Without word times, the segment's time is divided evenly."""
    if segment.words:
        return [(word.word, to_ms(word.start), max(to_ms(word.start), to_ms(word.end))) for word in segment.words]
    words = segment.text.split()
    start, length = segment.start, max(segment.end - segment.start, 0) / max(len(words), 1)
    return [(word, to_ms(start + i * length), to_ms(start + (i + 1) * length)) for i, word in enumerate(words)]


def _split(word: str, max_width: int) -> list[str]:
    parts = [""]
    for character in word:
        if _width(parts[-1] + character) > max_width:
            parts.append("")
        parts[-1] += character
    return parts


def _columns(group: list[_Part]) -> int:
    return sum(part.width + len(part.space) for part in group) - len(group[0].space)


def _width(text: str) -> int:
    """Return the width of a text in columns. Combining marks take no column."""
    if text.isascii():
        return len(text)
    spaced = (character for character in text if not unicodedata.combining(character))
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in spaced)


def to_ms(seconds: float) -> int:
    """Convert seconds to whole milliseconds, at least 0."""
    return max(round(seconds * 1000), 0)


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
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n"
        + "\n".join([*cue.lines, ""]).replace("-->", "->")
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
