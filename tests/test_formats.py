import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.result import Result, Transcript, WordResult
from u2moe.runtime.text import formats
from u2moe.runtime.text.formats import FORMATS, SubtitleOptions, format_transcript, make_cues


def segment(*timed_words, space=" ", confidence=0.5):
    words = [WordResult(word=word, start=start, end=end, confidence=confidence) for word, start, end in timed_words]
    text = space.join(word for word, _, _ in timed_words)
    return Result(text=text, is_final=True, start=words[0].start, end=words[-1].end, words=words)


def timed(text, start=0.0):
    return [(word, start + i * 0.4, start + (i + 1) * 0.4) for i, word in enumerate(text.split())]


def transcript(*segments):
    return Transcript(text=" ".join(s.text for s in segments), duration=60.0, segments=list(segments))


TWO = transcript(
    segment(("GOOD", 0.5, 0.8), ("MORNING", 0.8, 1.3)), segment(("A&B", 3661.0, 3661.25), ("<C>", 3661.25, 3662.0))
)


WRITTEN = {
    "txt": "GOOD MORNING\nA&B <C>\n",
    "srt": "1\n00:00:00,500 --> 00:00:01,500\nGOOD MORNING\n\n2\n01:01:01,000 --> 01:01:02,000\nA&B <C>\n",
    "vtt": "WEBVTT\n\n00:00:00.500 --> 00:00:01.500\nGOOD MORNING\n\n"
    "01:01:01.000 --> 01:01:02.000\nA&amp;B &lt;C&gt;\n",
    "ctm": "my_clip.wav 1 0.500 0.300 GOOD 0.500\nmy_clip.wav 1 0.800 0.500 MORNING 0.500\n"
    "my_clip.wav 1 3661.000 0.250 A&B 0.500\nmy_clip.wav 1 3661.250 0.750 <C> 0.500\n",
    "TextGrid": 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n3662.000\n<exists>\n2\n'
    '"IntervalTier"\n"segments"\n0\n3662.000\n4\n0.000\n0.500\n""\n0.500\n1.300\n"GOOD MORNING"\n'
    '1.300\n3661.000\n""\n3661.000\n3662.000\n"A&B <C>"\n'
    '"IntervalTier"\n"words"\n0\n3662.000\n6\n0.000\n0.500\n""\n0.500\n0.800\n"GOOD"\n0.800\n1.300\n"MORNING"\n'
    '1.300\n3661.000\n""\n3661.000\n3661.250\n"A&B"\n3661.250\n3662.000\n"<C>"\n',
    "tsv": "start\tend\ttext\n500\t1300\tGOOD MORNING\n3661000\t3662000\tA&B <C>\n",
    "json": json.dumps({"file": "my clip.wav", **dataclasses.asdict(TWO)}) + "\n",
}


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_written(file_format):
    assert format_transcript(TWO, file_format, name="my clip.wav") == WRITTEN[file_format]
    described = FORMATS[file_format]
    empty = format_transcript(transcript(), file_format, name="my clip.wav")
    if described.header is None:
        assert empty or file_format == "srt"
        return
    assert empty == described.header
    lines = [described.segment(each, "my clip.wav") for each in TWO.segments]
    assert described.header + "".join(lines) == WRITTEN[file_format]


def test_the_guide_names_every_format_and_subtitles_are_cut_where_speakers_pause():
    table = re.findall(r"^\| (`\w+`.*?) \|", Path("docs/recognise.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*FORMATS, "events"} <= {name for row in table for name in re.findall(r"\w+", row)}
    with pytest.raises(ValueError, match="format must be one of txt, json, srt"):
        format_transcript(TWO, "doc")
    cues = make_cues([segment(*timed("THE BOY WAS THERE WHEN THE SUN ROSE OVER THE OLD HARBOUR"))])
    assert [cue.lines for cue in cues] == [("THE BOY WAS THERE WHEN THE", "SUN ROSE OVER THE OLD HARBOUR")]
    first = "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT"
    rest = "NINE TEN ELEVEN TWELVE THIRTEEN FOURTEEN FIFTEEN SIXTEEN SEVENTEEN EIGHTEEN"
    assert " ".join(make_cues([segment(*timed(first), *timed(rest, 3.9))])[0].lines) == first


def test_subtitles_stay_as_long_as_the_next_allows_also_without_word_times():
    cues = make_cues([segment(("BEFORE", 0.0, 0.5), ("AFTER", 3.0, 3.5), ("ALL", 3.5, 4.0))])
    assert [cue.lines for cue in cues] == [("BEFORE",), ("AFTER ALL",)]
    cues = make_cues([segment(("YES", 1.0, 1.2)), segment(("NO", 1.6, 1.9)), segment(("PERHAPS", 9.0, 9.1))])
    assert [(cue.start_ms, cue.end_ms) for cue in cues] == [(1000, 1517), (1600, 2600), (9000, 10000)]
    assert make_cues([segment(("A" * 40, 0.0, 0.5))])[0].end_ms == 2353  # 40 characters at 17 per second
    text = "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341" * 3
    cues = make_cues([segment(*((char, i * 0.1, i * 0.1 + 0.1) for i, char in enumerate(text)), space="")])
    assert "".join("".join(cue.lines) for cue in cues) == text
    assert all(len(line) <= 21 for cue in cues for line in cue.lines)
    result = Result(text="A B", is_final=True, start=2.0, end=4.0)
    assert format_transcript(transcript(result), "ctm") == "audio 1 2.000 1.000 A\naudio 1 3.000 1.000 B\n"
    assert make_cues([result])[0].start_ms == 2000
    unsure = transcript(segment(("A", 0.0, 1.0), confidence=None))
    assert format_transcript(unsure, "ctm") == "audio 1 0.000 1.000 A\n"


@st.composite
def segments(draw):
    """Draw segments with words in order; times may be equal or touch."""
    result, time = [], 0.0
    for _ in range(draw(st.integers(0, 4))):
        words = []
        for _ in range(draw(st.integers(1, 40))):
            start = time + draw(st.sampled_from([0.0, 0.0, 0.1, 0.7, 3.0]))
            time = start + draw(st.sampled_from([0.0, 0.04, 0.3, 0.9, 9.0]))
            text = draw(st.text("AB\u4e00&", min_size=1, max_size=draw(st.sampled_from([3, 9, 60]))))
            words.append((text, start, time))
        result.append(segment(*words))
    return result


@given(segments(), st.integers(2, 50), st.integers(1, 3))
def test_subtitles_hold_every_word_once_and_keep_the_rules(found, width, num_lines):
    cues = make_cues(found, SubtitleOptions(max_line_width=width, max_lines=num_lines))
    shown = "".join("".join(cue.lines) for cue in cues).replace(" ", "")
    assert shown == "".join(s.text for s in found).replace(" ", "")
    for cue in cues:
        assert 1 <= len(cue.lines) <= num_lines
        assert all(0 < sum(1 + (char == "\u4e00") for char in line) <= width for line in cue.lines)
        assert cue.start_ms < cue.end_ms
    for cue, following in itertools.pairwise(cues):
        assert cue.end_ms <= following.start_ms


CLOCK = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d)[,.](\d{3})")


@given(st.integers(0, 400_000_000))
def test_times_are_exact(ms):
    said = transcript(segment(("A", ms / 1000, ms / 1000 + 2)))
    for file_format in ("srt", "vtt"):
        hours, minutes, seconds, rest = map(int, CLOCK.search(format_transcript(said, file_format)).groups())
        assert ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest == ms
    assert format_transcript(said, "ctm").split()[2] == f"{ms // 1000}.{ms % 1000:03}"
    assert format_transcript(said, "tsv").splitlines()[1].split("\t")[0] == str(ms)


def test_the_arrow_of_times_is_not_in_a_text():
    for file_format in ("srt", "vtt"):
        assert format_transcript(transcript(segment(("A-->B", 0.0, 1.0))), file_format).count("-->") == 1


def test_the_work_grows_as_the_length(monkeypatch):
    """Each word can begin only subtitles of up to 7 s, which contain 28 words."""
    letters = [(chr(0x4E00 + i % 50), i * 0.25, i * 0.25 + 0.2) for i in range(4_800)]
    fits, tried = formats._fits, itertools.count(1)

    def counted(group, options):
        assert next(tried) <= 30 * len(letters)
        return fits(group, options)

    monkeypatch.setattr(formats, "_fits", counted)
    cues = make_cues([segment(*letters, space="")])
    assert next(tried) > len(letters)
    assert sum(len("".join(cue.lines)) for cue in cues) == len(letters)
