"""Written text: numbers, times, dates and money as digits, and sentence case; scores and times are kept."""

import dataclasses
import sys
from unittest.mock import Mock

import pytest
from corpora import ToyChoice
from feeding import CHUNKED, feed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tones import say, toy_recognizer

from u2moe.runtime import DecodingOptions, LanguageModel, TextFormat, TextFormatter, cli
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.language.kneser_ney import TrainingOptions, count_ngrams, train
from u2moe.runtime.result import Alternative, Result, WordResult
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary
from u2moe.runtime.text.written.english import SCALES, TEENS, TENS, UNITS, cardinal, ordinal, write, year
from u2moe.runtime.text.written.formatter import Casing

SPELLED = {number: word for words in (UNITS, TEENS, TENS) for word, number in words.items()}
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
            "twelve": "twelfth"}  # fmt: skip


def spell(number, join=""):
    """Return a number from 1 in words, with `join` (such as "and") before tens and units."""
    for scale, size in reversed(SCALES.items()):
        if number >= size:
            rest = number % size
            link = f" {join}" if join and 0 < rest < 100 else ""
            return f"{spell(number // size, join)} {scale}{link}{f' {spell(rest, join)}' if rest else ''}"
    if number >= 100:
        rest = number % 100
        link = f" {join}" if join and rest else ""
        return f"{SPELLED[number // 100]} hundred{link}{f' {spell(rest)}' if rest else ''}"
    if number in SPELLED:
        return SPELLED[number]
    return f"{SPELLED[number // 10 * 10]} {SPELLED[number % 10]}"


def written(text):
    return " ".join(part.text for part in write(text.split()))


@settings(max_examples=150)
@given(st.integers(1, 10**12 - 1), st.sampled_from(["", "and"]))
def test_every_number_is_read_as_it_is_spelled(number, join):
    words = spell(number, join).split()
    assert cardinal(words, 0) == (number, len(words))
    assert cardinal(["the", *words, "dogs"], 1) == (number, len(words) + 1)


@given(st.integers(1, 10**6))
@example(12)
def test_every_ordinal_is_read_as_it_is_spelled(number):
    *head, last = spell(number).split()
    regular = f"{last[:-1]}ie" if last.endswith("y") else last
    words = [*head, ORDINALS.get(last, f"{regular}th")]
    assert ordinal(["the", *words, "dog"], 1) == (number, len(words) + 1)


@given(st.integers(1300, 2099))
def test_every_year_is_read_as_it_is_said(number):
    century, rest = divmod(number, 100)
    if rest and century >= 13:
        said = f"{spell(century)} {'oh ' if rest < 10 else ''}{spell(rest)}".split()
        assert year(said, 0) == (number, len(said))
        assert written(" ".join(said)) == str(number)


VOCABULARY = sorted({*UNITS, *TEENS, *TENS, *SCALES, "hundred", "zero", "oh", "and", "a", "point", "percent", "dollars",
                     "cents", "cent", "p", "m", "am", "o'clock", "at", "may", "june", "first", "twentieth", "of", "dog",
                     "i", "monday", "new", "york"})  # fmt: skip


def result_of(words):
    spoken = [
        WordResult(word=word, start=float(place), end=place + 0.75, confidence=0.5 + place / 100)
        for place, word in enumerate(words)
    ]
    text = " ".join(words)
    best = Alternative(text=text, tokens=[1], score=-1.0, ctc_score=-1.0, attention_score=None)
    return Result(
        text=text, is_final=True, segment=3, start=0.0, end=len(words) - 0.25 if words else 0.0, tokens=[1, 2],
        times=[0.1, 0.2], words=spoken, confidence=0.7, score=-1.0, nbest=[best],
    )  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.sampled_from(VOCABULARY), max_size=12), st.booleans(), st.booleans())
def test_words_keep_their_times_whatever_is_said(words, numbers, capitals):
    spoken = result_of([word.upper() if capitals else word for word in words])
    parts = write(words)
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])][: len(parts)]
    assert sum(part.end - part.begin for part in parts) == len(words)
    found = TextFormatter(TextFormat(numbers=numbers)).result(spoken)
    assert found.text == " ".join(word.word for word in found.words)
    assert all(word.word and " " not in word.word for word in found.words)
    own = parts if numbers else [(word, place, place + 1) for place, word in enumerate(words)]
    for word, (_, begin, end) in zip(found.words, own, strict=True):
        assert (word.start, word.end) == (spoken.words[begin].start, spoken.words[end - 1].end)
        assert word.confidence == min(other.confidence for other in spoken.words[begin:end])
    assert (found.committed, found.num_committed) == (found.text, len(found.words))
    changed = ("text", "words", "nbest", "committed", "num_committed")
    assert dataclasses.replace(found, **{name: getattr(spoken, name) for name in changed}) == spoken
    (best,) = found.nbest
    assert dataclasses.replace(best, text=spoken.text) == spoken.nbest[0]
    assert best.text == found.text


PHRASES = ("York City", "New York City Hall", "McDonald")
READ_ON = (
    "a", "and", "at", "city", "half", "hundred", "london's", "march", "may", "million", "new", "of", "oh", "p", "m",
    "point", "states", "twenty", "united", "york",
)  # fmt: skip


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([*READ_ON, *VOCABULARY]), max_size=9),
    st.sampled_from([TextFormat(capitalized=PHRASES), TextFormat(numbers=False), TextFormat(casing=False)]),
)
def test_what_follows_does_not_change_what_is_committed(words, text_format):
    formatter = TextFormatter(text_format)
    spoken = [word.upper() for word in words]
    whole, num = formatter.text(" ".join(spoken)).split(), 0
    for end in range(len(spoken) + 1):
        text = " ".join(spoken[:end])
        found = formatter.result(Result(text=text, is_final=False, committed=text, num_committed=end))
        assert found.text.split()[: found.num_committed] == found.committed.split() == whole[: found.num_committed]
        assert found.num_committed >= num
        num = found.num_committed


def test_vocabularies_of_two_scripts_or_cases():
    for symbols, text, expected in (
        (["▁TEN", "▁DOGS", "<unk>"], "TEN DOGS", "10 dogs"),
        (["▁TEN", "▁DOGS", "中"], "TEN DOGS", ""),  # if 中 follows, everything stays as spoken
        (["▁TEN", "▁DOGS", "中"], "TEN DOGS 中", "TEN DOGS 中"),
        (["▁I", "▁am"], "I", ""),
        (["▁I", "▁am"], "I am", "I am"),
    ):
        vocabulary, num = Vocabulary(symbols, TextConfig(tokenizer="bpe")), len(text.split())
        found = TextFormatter().result(Result(text=text, is_final=False, committed=text, num_committed=num), vocabulary)
        assert (found.committed, found.num_committed) == (expected, len(expected.split()))


@pytest.mark.parametrize(("spoken", "expected"), [
    ("I THINK MAY FIFTH IS FINE FOR MCDONALD", "I think May 5 is fine for McDonald"),
    ("IN NEW YORK ON MONDAY I'M OLD MCDONALD'S DOG", "In New York on Monday I'm old McDonald's dog"),
    ("NEW SHOES MAY BE NICE", "New shoes may be nice"),
    ("THE TWENTY FIRST OF MAY OR THE FIFTH OF MARCH", "The 21st of May or the 5th of March"),
    ("IN SPITE OF MAY", "In spite of may"),
    ("He lives in new York", "He lives in new York"),
    ("He said Twenty five", "He said 25"),
    ("\u4f60\u597d ONE HUNDRED", "\u4f60\u597d ONE HUNDRED"),
])  # fmt: skip
def test_capitals_are_for_what_has_them(spoken, expected):
    assert TextFormatter(TextFormat(capitalized=("McDonald",))).text(spoken) == expected


def test_a_language_model_knows_what_has_capitals_and_streams_write_when_told(toy):
    text = [
        ["The", "dog", "of", "Anna", "is", "old"], ["Old", "dog", "and", "Anna"], ["so", "the", "Dog"], ["a", "dog"],
    ]  # fmt: skip
    assert LanguageModel(train(count_ngrams(text, 2), TrainingOptions(order=2))).capitalized() == ("Anna",)
    samples, _ = say("ABCD", [0.3, 0.3, 1.2, 0.3])
    plain = feed(toy, samples)
    options = dataclasses.replace(CHUNKED, text_format=TextFormat(capitalized=("B",)))
    formatted = feed(toy, samples, options=options)
    assert [segment.text for segment in plain] == ["A B", "C D"]
    assert [segment.text for segment in formatted] == ["A B", "C d"]
    assert [segment.times for segment in formatted] == [segment.times for segment in plain]
    assert [segment.score for segment in formatted] == [segment.score for segment in plain]
    stream = toy.create_stream(options)
    stream.accept_waveform(16_000, samples[:20_000])
    toy.decode_streams([stream])
    assert stream.get_result().text == "A b"[: len(stream.get_result().text)]


def test_every_word_is_looked_at_once_and_alternatives_written_alike_are_one():
    for wrong in ("Anna", [1]):
        with pytest.raises(ValueError):
            TextFormat(capitalized=wrong)
    spoken = result_of(["ZERO", "OH", "ONE"])
    other = dataclasses.replace(spoken.nbest[0], text="OH OH ONE", score=-2.0)
    found = TextFormatter().result(dataclasses.replace(spoken, nbest=[*spoken.nbest, other]))
    assert [(best.text, best.score) for best in found.nbest] == [("001", -1.0)]
    word = Mock(**{"lower.return_value": "one"})
    Casing().of(["one", *[word] * 999])  # a text may cover hours of speech
    assert word.lower.call_count == 999


@pytest.mark.slow
def test_the_command_line_writes_on_request_and_a_hotword_keeps_its_letter_case(capsys, tmp_path):
    (tmp_path / "names.txt").write_text("Work :0.1\n", encoding="utf-8")
    options = ["--format-text", "--hotwords", str(tmp_path / "names.txt")]
    assert cli.main(["transcribe", *options, str(DEMO_FOLDER / "clips" / "command.flac")]) == 0
    assert capsys.readouterr().out.endswith("Now get back to Work\n")


@pytest.mark.parametrize(("language", "spoken", "expected"), [
    # A space separates date and time, and the time has no zeros or seconds that were not spoken.
    ("zh", "二零二三年五月三十一日下午三点半", "2023/05/31 3:30p.m."),
    ("zh", "我有一百二十块五毛钱", "我有120块5毛钱"),
    ("zh", "百分之六十五点三", "65.3%"),
    ("zh", "他 HELLO 有一百个", "他 HELLO 有100个"),
    ("zh", "电话是一三八零零一二三四五六", "电话是13800123456"),
    ("zh", "十一点十分", "11:10"),
    # Errors of wetext: approximate numbers, quarters of hours, words that begin with a numeral.
    ("zh", "十有八九五六个人九点一刻十分好", "十有八九五六个人九点一刻十分好"),
    ("ja", "二千二十三年五月三十一日午後三時半", "2023年5月31日午後3時半"),
    ("ja", "八百屋で百二十五円", "八百屋で125円"),
    ("ja", "千葉で三百円", "千葉で300円"),
])  # fmt: skip
def test_chinese_and_japanese(language, spoken, expected):
    pytest.importorskip("wetext", reason="needs the extra written")
    formatter = TextFormatter(TextFormat(language=language))
    assert formatter.text(spoken) == expected
    symbols = spoken.split() if " " in spoken else list(spoken)
    symbols = [part for symbol in symbols for part in ([symbol] if symbol.isascii() else symbol)]
    result = dataclasses.replace(result_of(symbols), text=spoken)
    found = formatter.result(result)
    assert found.text == expected
    assert "".join(word.word for word in found.words).replace(" ", "") == expected.replace(" ", "")
    begins = [round(word.start) for word in found.words]
    assert (begins[0], found.words[-1].end) == (0, result.end)
    for word, begin, end in zip(found.words, begins, [*begins[1:], len(symbols)], strict=True):
        assert (word.start, word.end, word.confidence) == (begin, end - 0.25, 0.5 + begin / 100)
        assert word.word.strip().isascii() or end - begin == 1 or word.word[0].isdigit() or word.word.endswith("半")
    assert (found.committed, found.num_committed) == (expected, len(found.words))
    partial = formatter.result(dataclasses.replace(result, is_final=False, committed=spoken[:2], num_committed=2))
    assert (partial.text, partial.committed, partial.num_committed) == (expected, "", 0)
    assert TextFormatter(TextFormat(language=language, numbers=False)).text("ONE " + spoken) == "ONE " + spoken


def test_a_language_without_its_package_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wetext", None)
    options = DecodingOptions(text_format=TextFormat(language="zh"))
    with pytest.raises(ModuleNotFoundError, match="wetext"):
        toy_recognizer().create_stream(options)
    monkeypatch.setattr("u2moe.runtime.cli.transcribe.model_choice", lambda args: ToyChoice(options=options))
    assert cli.main(["transcribe", "--format-text", "zh", "a.wav"]) == 1
    assert "needs the Python package wetext: " in capsys.readouterr().err
