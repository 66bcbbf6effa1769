"""Splits ordinary text into sentences of words without punctuation, normalised as a recogniser writes them."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """How text is read.

    Attributes:
        raw: each line is one sentence, split at white space and not normalised.
        keep_case: keep letter case; otherwise text is lower-cased. (Either works with a vocabulary in capitals.)
    """

    raw: bool = option("flag", default=False, flag="--raw")
    keep_case: bool = option("flag", default=False, flag="--keep-case")


def read_sentences(files: Iterable[Path], options: TextOptions | None = None) -> Iterator[list[str]]:
    """Sentences of text files, plain or .gz, read line by line.

    Raises:
        LanguageModelError: a file cannot be read, or is not UTF-8.
    """
    options = checked_options("options", options, TextOptions())
    for file in files:
        for _, line in read_lines(file, "text", LanguageModelError):
            yield from [line.split()] if options.raw else sentences_of(line, keep_case=options.keep_case)


def sentences_of(text: str, *, keep_case: bool = False) -> Iterator[list[str]]:
    """Sentences of a line, split at sentence-final punctuation, without punctuation.

    Class names (<name>) are kept. Hyphens separate words, and each character of a script without spaces is a word.
    Words with digits, whose spoken form is unknown, become <unk>. Text is normalised to Unicode's form C.
    """
    for part in _END_OF_SENTENCE.split(unicodedata.normalize("NFC", text)):
        words = []
        for word in _words_of(part):
            if word.startswith("<"):
                words.append(word)
            elif any(character.isdigit() for character in word):
                words.append(_UNKNOWN)
            else:
                plain = word.replace("\u2019", "'").replace("_", "")
                words += _split(plain if keep_case else plain.lower())
        if any(word != _UNKNOWN for word in words):
            yield words


def _words_of(text: str) -> Iterator[str]:
    """Words and class names. A final apostrophe belongs to its word ("dogs'") unless it closes a quotation."""
    is_quoted = False
    for name, opening, word, closing in _word().findall(text):
        is_quoted = is_quoted or bool(opening)
        yield name or (word if is_quoted else word + closing)
        is_quoted = is_quoted and not closing


@functools.cache
def _word() -> re.Pattern[str]:
    letter = rf"[\w{combining_marks()}]"
    return re.compile(rf"(<[^<>\s]+>)|(['\u2018]?)({letter}+(?:['\u2019]{letter}+)*)(['\u2019]?)")


def _split(word: str) -> list[str]:
    """A word, split around characters of scripts without spaces."""
    spaced = "".join(f" {character} " if stands_alone(character) else character for character in word)
    return spaced.split()
