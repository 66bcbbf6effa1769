"""Cuts segments into subtitles with lines and times."""

import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.result import Result
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
