"""The vocabulary: conversion of token ids to text and words. For the reverse, see `spelling`."""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from u2moe.runtime.errors import BundleError

WORD_BOUNDARY = "\u2581"
"""LOWER ONE EIGHTH BLOCK: begins a word in BPE vocabularies, and is a space in character vocabularies."""
UNREADABLE = "\0"
"""Replaces symbols that are not text, such as <unk>. It is neither part of a word nor a word boundary."""

_SPACELESS = (
    (0x2E80, 0x312F),  # radicals, kana, bopomofo
    (0x3190, 0x9FFF),  # bopomofo, unified ideographs
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0xFF66, 0xFF9F),  # half-width katakana
    (0x1B000, 0x1B2FF),  # kana supplements
    (0x20000, 0x3FFFF),  # ideographs of the supplementary planes
)
_HANGUL = (
    (0x1100, 0x11FF),  # Jamo
    (0x3130, 0x318F),  # compatibility Jamo
    (0xA960, 0xA97F),  # Jamo extended A
    (0xAC00, 0xD7FF),  # syllables
)


def parse_tokens(
    content: str, *, file: str = "tokens.txt", error: Callable[[str], Exception] = BundleError
) -> list[str]:
    """Return symbols in the order of their ids, from lines of "symbol id", as in tokens.txt and units.txt.

    A symbol may be any text without a line feed, even a space. The id follows the last space or tab. `error` makes the
    error, which names `file`, if a line has no id, or if the ids are not exactly 0..n-1.
    """
    symbols: dict[int, str] = {}
    for number, raw_line in enumerate(content.removeprefix("\ufeff").split("\n"), start=1):
        line = raw_line.rstrip(" \t\r")
        if not line:
            continue
        cut = max(line.rfind(" "), line.rfind("\t"))
        symbol, digits = line[:cut], line[cut + 1 :]
        if cut < 1 or not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise error(f"{file}: line {number} must be 'symbol id', got {line[:80]!r}")
        if int(digits) in symbols:
            raise error(f"{file}: line {number}: id {int(digits)} already belongs to {symbols[int(digits)]!r}")
        symbols[int(digits)] = symbol
    missing = next((i for i in range(len(symbols)) if i not in symbols), None)
    if missing is not None:
        raise error(f"{file}: no symbol has id {missing}, expected ids 0 to {len(symbols) - 1}")
    return [symbols[i] for i in range(len(symbols))]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How to convert token ids to text."""

    tokenizer: Literal["char", "bpe"] = "char"
    """"char": symbols are concatenated; "bpe": U+2581 begins a word."""
    unk: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer not in ("char", "bpe"):
            raise ValueError(f"tokenizer must be 'char' or 'bpe', got {self.tokenizer!r}")


@dataclass(frozen=True, kw_only=True)
class Word:
    """Tokens `begin` to `end` (exclusive) of a hypothesis, and their text without surrounding spaces."""

    text: str
    begin: int
    end: int


class Vocabulary:
    """Symbols by id, and the rules for joining them into text and words.

    In character vocabularies (WeNet's `char`), symbols are concatenated and U+2581 becomes a space, whereas WeNet
    outputs U+2581 itself. In BPE vocabularies, U+2581 begins a word. In vocabularies of either kind, every symbol of a
    script without spaces (Chinese, Japanese) is a word.
    """

    def __init__(self, symbols: Sequence[str], config: TextConfig) -> None:
        self.symbols = tuple(symbols)
        self.config = config

    def __len__(self) -> int:
        return len(self.symbols)

    @functools.cached_property
    def has_spaceless(self) -> bool:
        """Whether any symbol belongs to a script without spaces."""
        return any(stands_alone(character) for symbol in self.symbols for character in symbol)

    @functools.cached_property
    def has_both_cases(self) -> bool:
        """Whether the symbols contain both upper and lower case."""
        text = "".join(symbol for symbol in self.symbols if not is_special(symbol))
        return text not in (text.upper(), text.lower())

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without leading and trailing spaces."""
        joined = "".join(self.symbols[token] for token in tokens)
        return " ".join(joined.replace(WORD_BOUNDARY, " ").split())

    def words(self, tokens: Sequence[int]) -> list[Word]:
        """Split token ids into words: at U+2581 and spaces, and around symbols of scripts without spaces."""
        words: list[Word] = []
        text, begin, has_ended = "", 0, False
        for index, token in enumerate(tokens):
            part, begins, ends = self._parts[token]
            if begins or has_ended:
                if text:
                    words.append(Word(text=text, begin=begin, end=index))
                text = ""
            if not text:
                begin = index
            text += part
            has_ended = ends
        if text:
            words.append(Word(text=text, begin=begin, end=len(tokens)))
        return words

    def complete_words(self, tokens: Sequence[int], *, ends: bool) -> list[Word]:
        """Return the words of token ids, except a last word that later tokens may continue; none follow if `ends`."""
        words = self.words(tokens)
        if words and words[-1].end == len(tokens) and not (ends or self._parts[tokens[-1]][2]):
            words.pop()
        return words

    @functools.cached_property
    def word_starts(self) -> bytes:
        """For each token, 1 if it begins a word, else 0."""
        return bytes(begins for _, begins, _ in self._parts)

    @functools.cached_property
    def _parts(self) -> list[tuple[str, bool, bool]]:
        """For each token: the part of a word that it spells, whether it begins a word, and whether it ends a word."""
        parts = []
        for spelled in self.symbols:
            symbol = spelled.replace(WORD_BOUNDARY, " ")
            part = symbol.strip()
            alone = stands_alone(part)
            parts.append((part, alone or symbol.startswith(" "), alone or symbol.endswith(" ")))
        return parts


def join_texts(texts: Sequence[str]) -> str:
    """Join non-empty texts with a space between them, except next to characters of scripts without spaces."""
    joined = ""
    for text in texts:
        apart = joined and not stands_alone(joined[-1]) and not stands_alone(text[0])
        joined += f" {text}" if apart else text
    return joined


def stands_alone(symbol: str) -> bool:
    """Return whether a symbol belongs to a script without spaces, which makes it a word by itself."""
    return _is_within(symbol, _SPACELESS)


@functools.cache
def combining_marks() -> str:
    """Return combining marks (accents, vowel signs) and joiners, for use in a character class of `re`.

    `re` does not count marks as letters. Without them, words in Hindi, Tamil or decomposed Latin would be split.
    """
    blocks = (range(0x300, 0x1F000), range(0xE0100, 0xE01F0))
    marks = (chr(code) for block in blocks for code in block if unicodedata.category(chr(code))[0] == "M")
    return "\u200c\u200d" + "".join(marks)


def is_special(symbol: str) -> bool:
    """Return whether a symbol or word is a marker, such as <s>, <unk> or the name of a class."""
    return len(symbol) > 2 and symbol.startswith("<") and symbol.endswith(">")


def with_boundaries(symbol: str, is_word: Callable[[str], bool] = stands_alone) -> str:
    """Return a symbol or phrase with `WORD_BOUNDARY` in place of spaces, and around characters that are words."""
    if is_special(symbol):
        return UNREADABLE
    spaced = "".join(f" {character} " if is_word(character) else character for character in symbol)
    return re.sub(rf"[\s{WORD_BOUNDARY}]+", WORD_BOUNDARY, spaced)


def is_syllabic(symbol: str) -> bool:
    """Return whether a symbol belongs to a script without spaces, or to Hangul (Korean attaches endings to words)."""
    return _is_within(symbol, _SPACELESS + _HANGUL)


def _is_within(symbol: str, ranges: Sequence[tuple[int, int]]) -> bool:
    return bool(symbol) and all(any(low <= ord(char) <= high for low, high in ranges) for char in symbol)
