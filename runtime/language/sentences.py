"""Splits text into sentences, removes punctuation, and normalises the words to look like a recogniser's output."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from u2moe.runtime.declarations import option
from u2moe.runtime.errors import LanguageModelError
from u2moe.runtime.language.kneser_ney import MARKERS
from u2moe.runtime.text.lines import read_lines
from u2moe.runtime.text.vocabulary import combining_marks, stands_alone
from u2moe.runtime.validation import checked_options

_UNKNOWN = MARKERS[0]
_END_OF_SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f]+(?=[\"')\]\u201d\u2019]*(?:\s|$))|[\u3002\uff01\uff1f]")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for reading text.

    Attributes:
        raw: whether each line is one sentence, split at white space and not normalised.
        keep_case: whether to keep the letter case; otherwise text becomes lower case. An upper-case vocabulary works
            with both settings.
    """

    raw: bool = option("flag", default=False, flag="--raw")
    keep_case: bool = option("flag", default=False, flag="--keep-case")


def read_sentences(files: Iterable[Path], options: TextOptions | None = None) -> Iterator[list[str]]:
    """Yield the sentences of plain or .gz text files. Raises LanguageModelError if one cannot be read as UTF-8."""
    options = checked_options("options", options, TextOptions())
    for file in files:
        for _, line in read_lines(file, "text", LanguageModelError):
            yield from [line.split()] if options.raw else sentences_of(line, keep_case=options.keep_case)


def sentences_of(text: str, *, keep_case: bool = False) -> Iterator[list[str]]:
    """Split a line at sentence-final punctuation; yield the words of each sentence without punctuation.

    Class names (<name>) are kept. Hyphens separate words. In scripts without spaces, each character is a word.
    Words with digits become <unk>, since their spoken form is unknown. Text is normalised to NFC.
    """
    for sentence in _sentences(unicodedata.normalize("NFC", text)):
        words = []
        for word, _ in sentence:
            if word.startswith("<"):
                words.append(word)
            elif any(character.isdigit() for character in word):
                words.append(_UNKNOWN)
            else:
                words += _split(_plain(word) if keep_case else _plain(word).lower())
        if any(word != _UNKNOWN for word in words):
            yield words


class WrittenWord(NamedTuple):
    """A word with its punctuation, and the spoken words in it: "twenty-one," contains two."""

    text: str
    spoken: tuple[str, ...]


def written_sentences(text: str) -> Iterator[tuple[str, list[WrittenWord]]]:
    """Yield each sentence of a line as written, and its words. Sentences are split as in `sentences_of`."""
    text = unicodedata.normalize("NFC", text)
    parts = ([part for word, start in sentence for part in _parts(word, start)] for sentence in _sentences(text))
    sentences = list(filter(None, parts))
    spans = [span for sentence in sentences for span in sentence]
    begin = sentence_begin = place = 0
    for sentence in sentences:
        words: list[WrittenWord] = []
        spoken: list[str] = []
        for number, (word, _, end) in enumerate(sentence, start=1):
            spoken.append(_plain(word))
            place += 1
            is_last = place == len(spans)
            between = text[end : len(text) if is_last else spans[place][1]]
            opening = re.search(r"(?<=\s)\S+$", between)  # such as a quotation mark, which belongs to the next word
            is_written = number == len(sentence) or any(map(str.isspace, between))
            if is_written or stands_alone(word) or stands_alone(spans[place][0]):
                cut = end + (opening.start() if opening and not is_last else len(between))
                words.append(WrittenWord(" ".join(text[begin:cut].split()), tuple(filter(None, spoken))))
                spoken, begin = [], cut
        yield " ".join(text[sentence_begin:begin].split()), words
        sentence_begin = begin


def _sentences(text: str) -> Iterator[list[tuple[str, int]]]:
    """Yield the words and class names of each sentence, with their positions in the text. A sentence may be empty."""
    begin = 0
    for closing in (*_END_OF_SENTENCE.finditer(text), None):
        words, is_quoted = [], False
        for found in _word().finditer(text, begin, closing.start() if closing else len(text)):
            name, opening, word, quote = found.groups("")
            is_quoted = is_quoted or bool(opening)
            # A final apostrophe belongs to its word ("dogs'") unless it closes a quotation.
            words.append((name or (word if is_quoted else word + quote), found.start() + len(opening)))
            is_quoted = is_quoted and not quote
        yield words
        begin = closing.end() if closing else 0


def _parts(word: str, start: int) -> Iterator[tuple[str, int, int]]:
    """Split a word around characters of scripts without spaces; yield each part with its start and end."""
    for part in _split(word):  # without spaces, so each part begins where the one before it ends
        yield part, start, start + len(part)
        start += len(part)


def _plain(word: str) -> str:
    return word.replace("\u2019", "'").replace("_", "")


@functools.cache
def _word() -> re.Pattern[str]:
    letter = rf"[\w{combining_marks()}]"
    return re.compile(rf"(<[^<>\s]+>)|(['\u2018]?)({letter}+(?:['\u2019]{letter}+)*)(['\u2019]?)")


def _split(word: str) -> list[str]:
    """Split a word around characters of scripts without spaces."""
    return "".join(f" {character} " if stands_alone(character) else character for character in word).split()
